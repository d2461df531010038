"""The whole objective against formulas written out here.

Legend: B rows, T packed positions, D hidden, V vocabulary, Z latent.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from cdpvae import Posterior, SoftPromptVAELoss, StepPlan
from cdpvae.batch import PackedText, next_token_targets

D, V, Z = 6, 19, 4
SPECIAL = torch.tensor([0, 1, 2])
# Lengths differ, so that a mean of means is another number than the mean over tokens.
TEXTS = [
    [0, 5, 6, 1],
    [0, 7, 7, 8, 9, 10, 11, 1],
    [0, 12, 1],
    [0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1],
    [0, 18, 1],
    [0, 14, 15, 14, 1],
    [0, 16, 1],
    [0, 17, 3, 17, 3, 17, 1],
]
NUM_TARGETS = sum(len(text) - 1 for text in TEXTS)


def plan(**changes):
    settings = dict(
        step=0,
        epoch=0,
        beta=0.7,
        bow_weight=1.3,
        contrastive_weight=0.4,
        word_dropout=0.0,
        target_divisor=float(NUM_TARGETS),
        with_view=True,
    )
    return StepPlan(**(settings | changes))


class Example:
    """Eight rows with every input of the loss, fp64 leaves with gradients."""

    def __init__(self):
        generator = torch.Generator().manual_seed(11)

        def leaf(*shape):
            value = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return value.requires_grad_()

        num_rows = len(TEXTS)
        self.hidden = leaf(sum(map(len, TEXTS)), D)
        self.head = leaf(V, D)
        self.mu, self.logvar = leaf(num_rows, Z), leaf(num_rows, Z)
        self.view_mu, self.view_logvar = leaf(num_rows, Z), leaf(num_rows, Z)
        self.bow_weight, self.bow_bias = leaf(V, Z), leaf(V)
        self.noise = torch.randn(num_rows, Z, generator=generator, dtype=torch.float64)

    @property
    def leaves(self):
        return [value for value in vars(self).values() if value.requires_grad]

    def inputs(self, start=0, stop=None, view=True):
        """Rows [start, stop) as the loss takes them."""
        rows = slice(start, stop)
        response = PackedText.from_lists(TEXTS[rows])
        target_rows, targets = next_token_targets(response)
        first = sum(map(len, TEXTS[:start]))
        mu, logvar = self.mu[rows], self.logvar[rows]
        return dict(
            hidden=self.hidden[first : first + response.ids.numel()],
            head_weight=self.head,
            target_rows=target_rows,
            targets=targets,
            posterior=Posterior(mu, logvar),
            z=mu + (logvar / 2).exp() * self.noise[rows],
            bow_weight=self.bow_weight,
            bow_bias=self.bow_bias,
            response=response,
            special_ids=SPECIAL,
            view=Posterior(self.view_mu[rows], self.view_logvar[rows]) if view else None,
        )

    def expected(self):
        """nll (B,), KL per dimension (Z,), BoW, InfoNCE; nothing of cdpvae.loss."""
        inputs = self.inputs()
        logits = (inputs["hidden"] @ self.head.t())[inputs["target_rows"]]
        nll = F.cross_entropy(logits, inputs["targets"], reduction="none")
        per_row = torch.stack([part.sum() for part in nll.split([len(t) - 1 for t in TEXTS])])
        kl_dim = ((self.mu**2 + self.logvar.exp() - 1 - self.logvar) / 2).mean(0)
        present = torch.zeros(len(TEXTS), V, dtype=torch.float64)
        for row, text in enumerate(TEXTS):
            present[row, [token for token in text if token > 2]] = 1
        logits = inputs["z"] @ self.bow_weight.t() + self.bow_bias
        bow = F.binary_cross_entropy_with_logits(logits, present)
        cosine = F.normalize(self.mu, dim=1) @ F.normalize(self.view_mu, dim=1).t()
        infonce = -(cosine / 0.07).log_softmax(1).diag().mean()
        return per_row, kl_dim, bow, infonce


def assert_same_gradients(got, want, leaves):
    got = torch.autograd.grad(got, leaves, allow_unused=True)
    want = torch.autograd.grad(want, leaves, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss_scale", ["per_token", "elbo"])
def test_total_and_gradients_follow_the_formula(loss_scale):
    example = Example()
    terms = SoftPromptVAELoss(latent_dim=Z, loss_scale=loss_scale)(**example.inputs(), plan=plan())
    per_row, kl_dim, bow, infonce = example.expected()
    floored = kl_dim.clamp(min=0.5).sum()
    recon = per_row.sum() / NUM_TARGETS
    if loss_scale == "per_token":
        want = recon + 0.7 * floored / Z + 1.3 * bow + 0.4 * infonce
    else:
        want = per_row.mean() + 0.7 * floored + 1.3 * bow + 0.4 * infonce
    torch.testing.assert_close(terms.total, want, rtol=1e-12, atol=0)
    assert_same_gradients(terms.total, want, example.leaves)
    for name, value in {
        "recon": recon,
        "kl": floored / Z,
        "kl_raw": kl_dim.sum(),
        "bow": bow,
        "infonce": infonce,
        "kl_per_dim": kl_dim,
        "recon_nats_per_sequence": per_row.mean(),
        "neg_elbo": per_row.mean() + kl_dim.sum(),
        "mi_bound": math.log(8) - infonce,
    }.items():
        torch.testing.assert_close(getattr(terms, name).detach(), value.detach(), msg=name)
    assert terms.active_dims.item() == (kl_dim > 0.5).sum().item()
    assert terms.mi_cap == math.log(8)


@pytest.mark.parametrize("loss_scale", ["per_token", "elbo"])
def test_weighted_terms_add_up_to_the_total(loss_scale):
    example = Example()
    loss = SoftPromptVAELoss(latent_dim=Z, loss_scale=loss_scale, micro_batches_per_step=3)
    terms = loss(**example.inputs(), plan=plan())
    weighted = loss.weighted_terms(terms, plan())
    assert list(weighted) == ["recon", "kl", "bow", "infonce"]
    # An fp64 ulp or two: in "elbo" the reconstruction is scaled back from its per-token form.
    torch.testing.assert_close(sum(weighted.values()), terms.total, rtol=1e-14, atol=0)
    gradients = [
        torch.autograd.grad(w, example.mu, retain_graph=True, allow_unused=True)[0]
        for w in weighted.values()
    ]
    assert gradients[0] is None  # here the decoder's output does not depend on mu
    (whole,) = torch.autograd.grad(terms.total, example.mu)
    torch.testing.assert_close(sum(gradients[1:]), whole, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss_scale", ["per_token", "elbo"])
def test_weighted_terms_add_up_without_gradients_too(loss_scale):
    example = Example()
    loss = SoftPromptVAELoss(latent_dim=Z, loss_scale=loss_scale)
    with torch.no_grad():
        terms = loss(**example.inputs(), plan=plan())
    weighted = loss.weighted_terms(terms, plan())
    assert weighted["recon"] > 0
    torch.testing.assert_close(sum(weighted.values()), terms.total)


def test_reconstruction_does_not_depend_on_how_the_window_is_cut():
    """Accumulation 1 x 8 and 8 x 1, gradients averaged as the engine does."""
    example = Example()
    cuts = {1: [(0, 8)], 8: [(i, i + 1) for i in range(8)], 3: [(0, 1), (1, 6), (6, 8)]}
    results = {}
    for count, cut in cuts.items():
        loss = SoftPromptVAELoss(latent_dim=Z, micro_batches_per_step=count)
        recons = [loss(**example.inputs(*rows, view=False), plan=plan()).recon for rows in cut]
        mean = torch.stack(recons).mean()
        results[count] = mean, torch.autograd.grad(mean, (example.hidden, example.head))
    whole, gradients = results[1]
    for mean, other in (results[8], results[3]):
        torch.testing.assert_close(mean, whole, rtol=1e-13, atol=0)
        for a, b in zip(other, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    # The mean of means, which this must not be, is another number.
    per_row = example.expected()[0]
    means = per_row / torch.tensor([len(text) - 1 for text in TEXTS])
    assert abs((means.mean() - whole).item()) > 1e-3


@pytest.mark.parametrize("loss_scale", ["per_token", "elbo"])
def test_total_gradient_does_not_depend_on_how_the_window_is_cut(loss_scale):
    """1 x 8 and 8 x 1 with the terms that are sums over rows; KL floor and InfoNCE are not."""
    example = Example()
    leaves = [example.hidden, example.head, example.mu, example.bow_weight, example.bow_bias]
    step = plan(beta=0.0, contrastive_weight=0.0)
    results = []
    for cut in ([(0, 8)], [(i, i + 1) for i in range(8)]):
        loss = SoftPromptVAELoss(
            latent_dim=Z, loss_scale=loss_scale, micro_batches_per_step=len(cut)
        )
        totals = [loss(**example.inputs(*rows, view=False), plan=step).total for rows in cut]
        mean = torch.stack(totals).mean()
        results.append((mean, torch.autograd.grad(mean, leaves)))
    per_row, _, bow, _ = example.expected()
    main = per_row.mean() if loss_scale == "elbo" else per_row.sum() / NUM_TARGETS
    want = main + 1.3 * bow
    wanted = torch.autograd.grad(want, leaves)
    for mean, gradients in results:
        torch.testing.assert_close(mean, want, rtol=1e-12, atol=0)
        for a, b in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    "settings, bow_weight, contrastive_weight",
    [
        pytest.param({}, 1.5, 0.1, id="the_description's"),
        pytest.param({"bow_loss_weight": 0.9, "contrastive_weight": 0.6}, 0.9, 0.6, id="given"),
    ],
)
def test_weights_of_the_constructor_count_without_a_plan(settings, bow_weight, contrastive_weight):
    example = Example()
    terms = SoftPromptVAELoss(latent_dim=Z, **settings)(**example.inputs())
    per_row, kl_dim, bow, infonce = example.expected()
    kl = kl_dim.clamp(min=0.5).sum() / Z
    want = per_row.sum() / NUM_TARGETS + kl + bow_weight * bow + contrastive_weight * infonce
    torch.testing.assert_close(terms.total, want, rtol=1e-12, atol=0)


def test_without_a_plan_the_attributes_count():
    example = Example()
    loss = SoftPromptVAELoss(latent_dim=Z)
    loss.beta, loss.bow_loss_weight, loss.contrastive_weight = 0.2, 2.5, 0.3
    per_row, kl_dim, bow, infonce = example.expected()
    kl = kl_dim.clamp(min=0.5).sum() / Z
    want = per_row.sum() / NUM_TARGETS + 0.2 * kl + 2.5 * bow + 0.3 * infonce
    torch.testing.assert_close(loss(**example.inputs()).total, want, rtol=1e-12, atol=0)


def test_ignored_targets_do_not_count():
    example = Example()
    inputs = example.inputs()
    inputs["targets"] = inputs["targets"].clone()
    inputs["targets"][len(TEXTS[0]) - 1 :] = -100  # only the first text remains
    terms = SoftPromptVAELoss(latent_dim=Z)(**inputs)
    want = example.expected()[0][0] / (len(TEXTS[0]) - 1)
    torch.testing.assert_close(terms.recon, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss_scale", ["per_token", "elbo"])
@pytest.mark.parametrize("with_plan", [False, True])
@pytest.mark.parametrize("all_ignored", [False, True])
def test_nothing_to_predict_gives_zero_and_no_nan(all_ignored, with_plan, loss_scale):
    example = Example()
    inputs = example.inputs()
    inputs["targets"] = torch.full_like(inputs["targets"], -100)
    if not all_ignored:
        inputs["target_rows"], inputs["targets"] = inputs["target_rows"][:0], inputs["targets"][:0]
    step = plan(target_divisor=0.0) if with_plan else None
    loss = SoftPromptVAELoss(latent_dim=Z, loss_scale=loss_scale)
    terms = loss(**inputs, plan=step)
    assert terms.recon.item() == 0.0 and terms.recon_nats_per_sequence.item() == 0.0
    assert loss.weighted_terms(terms, step)["recon"].item() == 0.0
    terms.total.backward()
    assert example.hidden.grad.count_nonzero() == 0
    assert all(leaf.grad.isfinite().all() for leaf in (example.mu, example.logvar))


@pytest.mark.parametrize(
    "off, term, untouched",
    [
        ("beta", "kl", ()),
        ("bow_weight", "bow", ("bow_weight", "bow_bias")),
        ("contrastive_weight", "infonce", ("view_mu",)),
    ],
)
def test_a_weight_of_zero_reports_the_term_without_a_graph(off, term, untouched):
    example = Example()
    loss = SoftPromptVAELoss(latent_dim=Z)
    on = loss(**example.inputs(), plan=plan())
    step = plan(**{off: 0.0})
    terms = loss(**example.inputs(), plan=step)
    reported = getattr(terms, term)
    assert getattr(on, term).requires_grad and not reported.requires_grad
    torch.testing.assert_close(reported, getattr(on, term).detach())
    weighted = loss.weighted_terms(terms, step)[term]
    assert weighted.item() == 0.0 and not weighted.requires_grad
    terms.total.backward()
    assert all(getattr(example, name).grad is None for name in untouched)


def test_a_term_without_weight_cannot_spoil_the_total():
    example = Example()
    inputs = example.inputs()
    inputs["posterior"] = Posterior(example.mu, torch.full_like(example.logvar, 1e4))
    terms = SoftPromptVAELoss(latent_dim=Z)(**inputs, plan=plan(beta=0.0))
    assert terms.kl.isinf() and terms.total.isfinite()


def test_without_a_view_there_is_no_infonce():
    example = Example()
    loss = SoftPromptVAELoss(latent_dim=Z, queue_size=4)
    terms = loss(**example.inputs(view=False), plan=plan())
    assert (terms.infonce, terms.mi_bound, terms.mi_cap) == (None, None, None)
    assert list(loss.weighted_terms(terms, plan())) == ["recon", "kl", "bow"]
    assert loss.queue.rows() is None


@pytest.mark.parametrize("loss_scale", ["per_token", "elbo"])
def test_without_a_latent_only_the_reconstruction_is_left(loss_scale):
    example = Example()
    inputs = example.inputs(view=False)
    inputs.update(posterior=None, z=None, bow_weight=None, bow_bias=None)
    loss = SoftPromptVAELoss(latent_dim=Z, loss_scale=loss_scale)
    terms = loss(**inputs, plan=plan())
    per_row = example.expected()[0]
    main = per_row.mean() if loss_scale == "elbo" else per_row.sum() / NUM_TARGETS
    torch.testing.assert_close(terms.total, main, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.neg_elbo, per_row.mean().detach())
    zeros = (terms.kl, terms.kl_raw, terms.bow, terms.active_dims)
    assert [value.item() for value in zeros] == [0, 0, 0, 0]
    assert terms.kl_per_dim.tolist() == [0.0] * Z
    assert_same_gradients(terms.total, main, [example.hidden, example.head])


def test_queue_takes_the_positives_after_the_loss():
    example = Example()
    loss = SoftPromptVAELoss(latent_dim=Z, queue_size=12)
    first = loss(**example.inputs(), plan=plan())
    assert first.mi_cap == math.log(8)  # the positives are not yet their own negatives
    positives = F.normalize(example.view_mu, dim=1).detach().float()
    torch.testing.assert_close(loss.queue.rows(), positives)
    second = loss(**example.inputs(), plan=plan())
    assert second.mi_cap == math.log(16) and second.infonce > first.infonce
    torch.testing.assert_close(loss.queue.rows(), torch.cat((positives, positives))[-12:])


def test_evaluation_reads_the_queue_and_leaves_it():
    example = Example()
    loss = SoftPromptVAELoss(latent_dim=Z, queue_size=12)
    loss(**example.inputs(), plan=plan())
    before = loss.queue.rows().clone()
    with torch.no_grad():
        terms = loss(**example.inputs(), plan=plan())
    assert terms.mi_cap == math.log(16) and not terms.total.requires_grad
    assert torch.equal(loss.queue.rows(), before)


def test_queue_fills_while_the_contrastive_weight_is_zero():
    example = Example()
    loss = SoftPromptVAELoss(latent_dim=Z, queue_size=12)
    loss(**example.inputs(), plan=plan(contrastive_weight=0.0))
    assert len(loss.queue) == 8


def test_state_is_the_queue():
    example = Example()
    loss = SoftPromptVAELoss(latent_dim=Z, queue_size=5)
    loss(**example.inputs(), plan=plan())
    restored = SoftPromptVAELoss(latent_dim=Z, queue_size=5)
    restored.load_state_dict(loss.state_dict())
    want = loss(**example.inputs(), plan=plan()).infonce
    assert torch.equal(restored(**example.inputs(), plan=plan()).infonce, want)
    with pytest.raises(ValueError, match="size 5"):
        SoftPromptVAELoss(latent_dim=Z, queue_size=6).load_state_dict(loss.state_dict())


def test_categorical_bow_is_reached():
    example = Example()
    terms = SoftPromptVAELoss(latent_dim=Z, bow_reduction="categorical")(**example.inputs())
    log_p = (example.inputs()["z"] @ example.bow_weight.t() + example.bow_bias).log_softmax(1)
    rows = [-log_p[i, [t for t in text if t > 2]].mean() for i, text in enumerate(TEXTS)]
    torch.testing.assert_close(terms.bow, torch.stack(rows).mean(), rtol=1e-12, atol=0)


def test_bf16_decoder_gives_fp32_scalars():
    example = Example()
    inputs = example.inputs()
    inputs["hidden"], inputs["head_weight"] = example.hidden.bfloat16(), example.head.bfloat16()
    for name in ("posterior", "view"):
        inputs[name] = Posterior(inputs[name].mu.float(), inputs[name].logvar.float())
    for name in ("z", "bow_weight", "bow_bias"):
        inputs[name] = inputs[name].float()
    terms = SoftPromptVAELoss(latent_dim=Z)(**inputs, plan=plan())
    values = {f.name: getattr(terms, f.name) for f in dataclasses.fields(terms)}
    del values["mi_cap"], values["row_weight"]
    assert {name: value.dtype for name, value in values.items()} == dict.fromkeys(
        values, torch.float32
    )


@pytest.mark.parametrize("loss_scale", ["per_token", "elbo"])
def test_shapes_propagate_without_data(loss_scale):
    mode = FakeTensorMode()

    def fake(value):
        if torch.is_tensor(value):
            return mode.from_tensor(value.detach()).requires_grad_(value.requires_grad)
        if dataclasses.is_dataclass(value):
            return type(value)(**{k: fake(v) for k, v in vars(value).items()})
        return value

    inputs = {name: fake(value) for name, value in Example().inputs().items()}
    with mode:
        loss = SoftPromptVAELoss(latent_dim=Z, loss_scale=loss_scale)
        terms = loss(**inputs, plan=plan())
        terms.total.backward()
        assert sum(loss.weighted_terms(terms, plan()).values()).shape == ()
    assert inputs["hidden"].grad.shape == inputs["hidden"].shape
    assert inputs["posterior"].mu.grad.shape == (len(TEXTS), Z)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"latent_dim": 0}, "latent_dim=0"),
        ({"loss_scale": "nats"}, "loss_scale='nats'.*per_token"),
        ({"bow_reduction": "sum"}, "bow_reduction='sum'"),
        ({"bow_loss_weight": -1.0}, "bow_loss_weight=-1.0"),
        ({"contrastive_weight": float("nan")}, "contrastive_weight=nan"),
        ({"micro_batches_per_step": 0}, "micro_batches_per_step=0"),
        ({"free_bits": -1.0}, "free_bits=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"queue_size": -1}, "size=-1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SoftPromptVAELoss(**({"latent_dim": Z} | settings))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"z": None}, "^z missing"),
        ({"posterior": None}, "^posterior missing"),
        (dict.fromkeys(("posterior", "z", "bow_weight", "bow_bias")), "a view without a posterior"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SoftPromptVAELoss(latent_dim=Z)(**(Example().inputs() | changes))


def test_posterior_of_another_width_is_refused():
    with pytest.raises(ValueError, match=f"has {Z} dimensions.*latent_dim=9"):
        SoftPromptVAELoss(latent_dim=9)(**Example().inputs())
