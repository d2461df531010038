"""The style of the HTML report: system fonts, one column, colours by role in light and dark."""

STYLE = """
:root { color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --ink: #1d2126; --soft: #626a73; --line: #e4e1db;
  --kept: #1f6f8b; --before: #c9d8de; --convert: #8d8d93; --filter: #d9822b; --duplicate: #7d5ba6;
  --alert: #b3261e; --alert-page: #fdeceb; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --card: #1c2024; --ink: #e8e6e1; --soft: #9aa3ab; --line: #31363c;
  --kept: #5cb8d6; --before: #36474f; --convert: #85858c; --filter: #e59a4c; --duplicate: #ab8bd1;
  --alert: #f2aaa5; --alert-page: #3a1d1b; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em }
h2 { font-size: 1.1rem; margin: 0 0 1rem }
header p { color: var(--soft); margin: 0 0 1.4rem; max-width: 40rem }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.3rem 1.4rem; margin-top: 1.2rem }
.alert { background: var(--alert-page); border-color: var(--alert) }
.alert h2, .alert b { color: var(--alert) }
.alert ul { margin: 0; padding-left: 1.2rem; overflow-wrap: anywhere }
.tiles { list-style: none; display: flex; flex-wrap: wrap; gap: .6rem 2.6rem; margin: 0;
  padding: 0 }
.tiles b { display: block; font-size: 1.7rem; line-height: 1.15; font-weight: 650 }
.tiles span, .legend, small, figcaption { color: var(--soft); font-size: .85rem }
.step { display: grid; grid-template-columns: 9rem 1fr 8.5rem; gap: 0 .9rem; align-items: center;
  padding: .22rem 0 }
.step .name { text-align: right; overflow: hidden; text-overflow: ellipsis }
.step .track { height: 1.35rem; border-radius: 4px;
  background: color-mix(in srgb, var(--before) 35%, transparent) }
.step i { display: block; height: 100%; min-width: 1px; border-radius: 4px;
  background: var(--kept) }
.dropped { grid-column: 2; font-size: .85rem; padding: .1rem 0 .2rem }
.dropped.not-converted { color: var(--soft) } .dropped.filtered { color: var(--filter) }
.dropped.duplicates { color: var(--duplicate) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .38rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  font-weight: 400 }
tr:first-child th { color: var(--soft); font-size: .8rem; white-space: nowrap }
th:first-child { text-align: left; overflow-wrap: anywhere; min-width: 9rem }
.plain td { text-align: left; overflow-wrap: anywhere }
.plain tr:first-child th { text-align: left }
.mix { min-width: 8rem; padding-right: 0 }
.stack { display: flex; height: .7rem; border-radius: 3px; overflow: hidden;
  background: var(--line) }
.stack i, .key::before { display: block; height: 100% }
i.kept, .key.kept::before { background: var(--kept) }
.key.before::before { background: var(--before) }
i.not-converted, .key.not-converted::before { background: var(--convert) }
i.filtered, .key.filtered::before { background: var(--filter) }
i.duplicates, .key.duplicates::before { background: var(--duplicate) }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .9rem 0 0 }
.key { white-space: nowrap }
.key::before { content: ""; display: inline-block; width: .7rem; height: .7rem; border-radius: 3px;
  margin-right: .4rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr));
  gap: 1rem 2rem }
figure { margin: 0 } figcaption { margin-bottom: .3rem }
svg { width: 100%; height: auto; display: block }
svg text { fill: var(--soft); font-size: 12px; text-anchor: middle }
svg text.up { text-anchor: end }
svg line { stroke: var(--line) }
svg .before { fill: var(--before) } svg .kept { fill: var(--kept) } svg .hit { fill: transparent }
details { border-top: 1px solid var(--line) } details:first-of-type { border-top: 0 }
summary { cursor: pointer; padding: .5rem 0; display: flex; gap: .9rem; align-items: baseline }
summary b { margin-left: auto; white-space: nowrap; font-weight: 600 }
summary .key { color: var(--soft); font-size: .85rem; min-width: 7.5rem }
summary::before { content: "\\25B8"; color: var(--soft); width: .8rem }
details[open] > summary::before { content: "\\25BE" }
details p { margin: 0 0 .3rem; color: var(--soft); font-size: .85rem }
pre { margin: 0 0 1rem; padding: .8rem 1rem; border-radius: 8px; background: var(--page);
  border: 1px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem }
code { font-size: .82rem }
@media (max-width: 40rem) { .step { grid-template-columns: 6.5rem 1fr 6rem } }
@media print { section { break-inside: avoid } body { background: none } }
"""
