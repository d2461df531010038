"""The Parquet file of codes: its schema, its identity, and the directory of unfinished work.

Columns are id (int64, the record's number in the input, from 0), record_id (the record's own `id`
as text, or null), text where it was asked for, and one fixed-size list for each tensor of the
family's code, flattened. The schema's metadata has the shapes under the key `cdpvae`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cdpvae import files
from cdpvae.batch import PackedText
from cdpvae.evaluation.checkpoint import OpenedRun
from cdpvae.latents import Code

KEY = b"cdpvae"
WORK_FILE = "work.json"


@torch.no_grad()
def describe_model(opened: OpenedRun) -> dict[str, Any]:
    """Return what codes depend on: checkpoint, settings, family and the shapes of its tensors.

    Raises ValueError for a model without a latent.
    """
    model = opened.model
    if not model.latent.reads_text:
        raise ValueError(
            f"checkpoint={str(opened.checkpoint)!r} was trained with --latent none; there are no "
            "codes, use a run with a latent"
        )
    # One short text shows what the family's tensors look like.
    text = PackedText.from_lists([[opened.tokenizer.bos_id]]).to(model.device)
    tensors = model.infer(text).tensors()
    return {
        "checkpoint": str(opened.checkpoint),
        "checkpoint_sha256": _checkpoint_hash(opened.checkpoint),
        "weights_sha256": _weights_hash(opened.checkpoint),
        "settings_sha256": files.sha256(opened.checkpoint / "settings.json"),
        "family": opened.settings.model.latent.kind,
        "shapes": {name: list(tensor.shape[1:]) for name, tensor in tensors.items()},
        "types": {
            name: "float32" if tensor.is_floating_point() else "int64"
            for name, tensor in tensors.items()
        },
    }


def check_same_weights(codes: Mapping[str, Any], model: Mapping[str, Any], source: str) -> None:
    """Raise ValueError for codes that other weights made than those that are to read them.

    codes, model: descriptions of the file and of the opened run. source: the file's name.
    """
    # Files of an earlier version have the hash of the whole checkpoint directory alone.
    key = "weights_sha256" if "weights_sha256" in codes else "checkpoint_sha256"
    if codes.get(key) != model[key]:
        raise ValueError(
            f"codes {source!r} were made by another checkpoint, {codes.get('checkpoint')}: its "
            f"{key} is {str(codes.get(key))[:12]}, that of {model['checkpoint']} "
            f"{model[key][:12]}; give that checkpoint, or insist with --any-checkpoint"
        )


def schema_of(description: Mapping[str, Any], with_text: bool) -> pa.Schema:
    """Return the columns of a file of codes, with `description` in the metadata."""
    fields = [pa.field("id", pa.int64()), pa.field("record_id", pa.string())]
    if with_text:
        fields.append(pa.field("text", pa.string()))
    for name, shape in description["shapes"].items():
        numbers = pa.type_for_alias(description["types"][name])
        fields.append(pa.field(name, pa.list_(numbers, math.prod(shape))))
    return pa.schema(fields, metadata={KEY: json.dumps(description, sort_keys=True).encode()})


def column_of(tensor: Tensor, type_: pa.DataType) -> pa.Array:
    """Return a code's tensor (rows, ...) as a column of fixed-size lists."""
    flat = tensor.reshape(-1).cpu()
    flat = flat.float() if flat.is_floating_point() else flat.long()
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.numpy()), type=type_)


def code_of(table: pa.Table, code_type: type[Code], shapes: Mapping[str, list[int]]) -> Code:
    """Return the code of a table's rows. code_type: of the family. shapes: of one row's tensors."""
    tensors = {}
    for name, shape in shapes.items():
        values = table.column(name).combine_chunks().flatten().to_numpy()
        tensors[name] = torch.tensor(values).reshape(len(table), *shape)
    return code_type(**tensors)


def read_description(path: Path) -> dict[str, Any]:
    """Return what a file of codes says of itself. Raises ValueError for any other file."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        return json.loads(metadata[KEY])
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = "no metadata of cdpvae" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"codes {str(path)!r} cannot be read: {reason.splitlines()[0]}; give a file that "
            "python -m cdpvae.encode wrote"
        ) from None


def open_work(directory: Path, identity: dict[str, Any], output: Path) -> None:
    """Begin or continue work. Raises ValueError where the directory holds work on something else.

    directory: exists. identity: all that the result depends on. output: where the result will go.
    """
    path = directory / WORK_FILE
    files.remove_temporaries(directory)
    if not path.exists():
        files.write_json(path, identity)
        return
    found = files.read_json(path)
    # Both sides went through JSON, so that tuples and lists compare equal.
    wanted = json.loads(json.dumps(identity))
    changed = [n for n in sorted({*found, *wanted}) if found.get(n) != wanted.get(n)]
    if changed:
        raise ValueError(
            f"output={str(output)!r} was begun with another {', '.join(changed)}; give the old "
            f"flags to continue, or remove {directory} to begin anew"
        )


def _weights_hash(checkpoint: Path) -> str:
    """Return a SHA-256 of the trained weights alone, heads and adapters.

    A checkpoint that is copied without its optimizer, or exported, keeps it.
    """
    # What a finished checkpoint's manifest has is not read again.
    manifest = checkpoint / files.MANIFEST
    known = files.read_json(manifest) if manifest.exists() else {}
    parts = []
    for path in sorted(checkpoint.rglob("*.safetensors")):
        name = path.relative_to(checkpoint).as_posix()
        entry = known.get(name)
        parts.append(f"{name} {entry['sha256'] if entry else files.sha256(path)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _checkpoint_hash(checkpoint: Path) -> str:
    """Return a SHA-256 that stands for every file of a checkpoint."""
    # The manifest of a checkpoint has the hash of each file.
    if (checkpoint / files.MANIFEST).exists():
        return files.sha256(checkpoint / files.MANIFEST)
    parts = [f"{p.name} {files.sha256(p)}" for p in sorted(checkpoint.iterdir()) if p.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
