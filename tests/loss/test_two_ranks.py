"""The objective on two gloo ranks, through the trainer's own `gather_rows`, equals one process.

The oracle is written out here and sees all rows. Each rank holds half of them and gradients are
averaged over ranks, as the engine does.

Legend: B local rows, K rows of all ranks, T packed positions, D hidden, V vocabulary, Z latent.
"""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from cdpvae import Posterior, SoftPromptVAELoss, StepPlan
from cdpvae.batch import PackedText, next_token_targets
from cdpvae.training.distributed import gather_rows

WORLD_SIZE, K, D, V, Z = 2, 6, 4, 13, 5
SCALES = ("per_token", "elbo")
TERMS = ("recon", "kl", "bow", "infonce")
PARAMETERS = ("hidden", "head", "mu", "logvar", "view", "bow_weight", "bow_bias")
BETA, BOW, CONTRASTIVE = 0.7, 1.3, 0.4
# The second rank has most of the tokens: a mean of the ranks' means is another number.
TEXTS = [[0, 3, 1], [0, 4, 1], [0, 1], [0, 5, 6, 7, 7, 8, 1], [0, 9, 9, 3, 10, 1], [0, 11, 12, 1]]
NUM_TARGETS = sum(len(text) - 1 for text in TEXTS)


def make_rows():
    generator = torch.Generator().manual_seed(7)

    def normals(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = {
        "hidden": normals(sum(map(len, TEXTS)), D),
        "mu": normals(K, Z),
        "logvar": 0.1 * normals(K, Z),
        "view": normals(K, Z),
        "noise": normals(K, Z),
    }
    # Dimension 0: above the floor on the first rank, below it on the second and in the mean.
    # Dimension 1: below it on the first rank, above it on the second and in the mean.
    rows["mu"][:, 0] = torch.tensor([1.2] * 3 + [0.1] * 3)
    rows["mu"][:, 1] = torch.tensor([0.1] * 3 + [3.0] * 3)
    return rows


def make_parameters():
    """What all ranks share, so that a gradient averaged over ranks has a meaning."""
    generator = torch.Generator().manual_seed(8)
    shapes = {"hidden": (D, D), "head": (V, D), "bow_weight": (V, Z), "bow_bias": (V,)}
    shapes |= dict.fromkeys(("mu", "logvar", "view"), (Z, Z))
    return {
        name: (
            torch.eye(Z, dtype=torch.float64)
            if name in ("mu", "logvar", "view")
            else torch.randn(shapes[name], generator=generator, dtype=torch.float64)
        ).requires_grad_()
        for name in PARAMETERS
    }


def local_inputs(parameters, rank):
    """The rank's half of the rows as the loss takes them."""
    size = K // WORLD_SIZE
    own = slice(rank * size, (rank + 1) * size)
    rows = make_rows()
    first = sum(map(len, TEXTS[: own.start]))
    response = PackedText.from_lists(TEXTS[own])
    target_rows, targets = next_token_targets(response)
    mu, logvar = (rows[name][own] @ parameters[name] for name in ("mu", "logvar"))
    return dict(
        hidden=rows["hidden"][first : first + response.ids.numel()] @ parameters["hidden"],
        head_weight=parameters["head"],
        target_rows=target_rows,
        targets=targets,
        posterior=Posterior(mu, logvar),
        z=mu + (logvar / 2).exp() * rows["noise"][own],
        bow_weight=parameters["bow_weight"],
        bow_bias=parameters["bow_bias"],
        response=response,
        special_ids=torch.tensor([0, 1, 2]),
        view=Posterior(rows["view"][own] @ parameters["view"], logvar),
    )


def gradients(value, parameters):
    found = torch.autograd.grad(
        value, list(parameters.values()), retain_graph=True, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True))


def mean_over_ranks(value):
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / WORLD_SIZE


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    plan = StepPlan(
        step=0,
        epoch=0,
        beta=BETA,
        bow_weight=BOW,
        contrastive_weight=CONTRASTIVE,
        word_dropout=0.0,
        target_divisor=float(NUM_TARGETS),
        with_view=True,
    )
    result = {}
    for scale in SCALES:
        loss = SoftPromptVAELoss(
            latent_dim=Z, loss_scale=scale, queue_size=8, micro_batches_per_step=WORLD_SIZE
        )
        # Once with an empty queue, once with the positives of the first call in it.
        for call in range(2):
            parameters = make_parameters()
            terms = loss(**local_inputs(parameters, rank), plan=plan, gather=gather_rows)
            key = f"{scale}/{call}"
            for name in ("kl", "kl_raw", "kl_per_dim", "active_dims", "infonce", "mi_bound"):
                result[f"{key}/{name}"] = getattr(terms, name).detach()
            result[f"{key}/mi_cap"] = terms.mi_cap
            result[f"{key}/total"] = mean_over_ranks(terms.total)
            for term, value in {**loss.weighted_terms(terms, plan), "total": terms.total}.items():
                for name, gradient in gradients(value, parameters).items():
                    result[f"{key}/d_{term}/{name}"] = mean_over_ranks(gradient)
        result[f"{scale}/queue"] = loss.queue.rows()
    mine = torch.full((2, 1), float(rank + 1), requires_grad=True)
    everyone = gather_rows(mine)
    (everyone[:, 0] * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    result["gathered"], result["gathered_grad"] = everyone.detach(), mine.grad
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def one_process(scale, call):
    """The same keys from all rows at once; nothing of cdpvae.loss."""
    rows, parameters = make_rows(), make_parameters()
    mu, logvar, view = (rows[name] @ parameters[name] for name in ("mu", "logvar", "view"))
    kl_dim = ((mu**2 + logvar.exp() - 1 - logvar) / 2).mean(0)
    floored = kl_dim.clamp(min=0.5).sum()

    hidden = (rows["hidden"] @ parameters["hidden"]).split(list(map(len, TEXTS)))
    logits = torch.cat([part[:-1] for part in hidden]) @ parameters["head"].t()
    targets = torch.tensor([token for text in TEXTS for token in text[1:]])
    nll = F.cross_entropy(logits, targets, reduction="sum")

    present = torch.zeros(K, V, dtype=torch.float64)
    for row, text in enumerate(TEXTS):
        present[row, [token for token in text if token > 2]] = 1
    z = mu + (logvar / 2).exp() * rows["noise"]
    bow = F.binary_cross_entropy_with_logits(
        z @ parameters["bow_weight"].t() + parameters["bow_bias"], present
    )

    positives = F.normalize(view, dim=1)
    # A queue holds fp32.
    queue = positives.detach().float().double() if call else positives.detach()[:0]
    cosine = F.normalize(mu, dim=1) @ torch.cat((positives, queue)).t()
    infonce = F.cross_entropy(cosine / 0.07, torch.arange(K))
    weighted = {
        "recon": nll / (K if scale == "elbo" else NUM_TARGETS),
        "kl": BETA * floored / (1 if scale == "elbo" else Z),
        "bow": BOW * bow,
        "infonce": CONTRASTIVE * infonce,
    }
    weighted["total"] = sum(weighted.values())
    result = {
        "kl": floored / Z,
        "kl_raw": kl_dim.sum(),
        "kl_per_dim": kl_dim,
        "active_dims": (kl_dim > 0.5).sum().double(),
        "infonce": infonce,
        "mi_bound": math.log(K + len(queue)) - infonce,
        "mi_cap": math.log(K + len(queue)),
        "total": weighted["total"],
    }
    result = {k: v.detach() if torch.is_tensor(v) else v for k, v in result.items()}
    for term, value in weighted.items():
        for name, gradient in gradients(value, parameters).items():
            result[f"d_{term}/{name}"] = gradient
    return result


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        mp.spawn(run_rank, args=(str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def assert_equal_on_all_ranks(ranks, scale, call, names):
    want = one_process(scale, call)
    for rank in ranks:
        for name in names:
            # fp64 sums in another order.
            torch.testing.assert_close(
                rank[f"{scale}/{call}/{name}"],
                want[name],
                rtol=1e-10,
                atol=1e-12,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def test_the_rows_tell_a_local_from_a_global_mean():
    rows = make_rows()
    kl = (rows["mu"] ** 2 + rows["logvar"].exp() - 1 - rows["logvar"]) / 2
    local = [(half.mean(0) > 0.5)[:2].tolist() for half in kl.chunk(WORLD_SIZE)]
    assert local == [[True, False], [False, True]]
    assert (kl.mean(0) > 0.5)[:2].tolist() == [False, True]


@pytest.mark.parametrize("call", [0, 1], ids=["empty_queue", "filled_queue"])
@pytest.mark.parametrize("scale", SCALES)
def test_values_equal_one_process(ranks, scale, call):
    names = ["kl", "kl_raw", "kl_per_dim", "active_dims", "infonce", "mi_bound", "mi_cap", "total"]
    assert_equal_on_all_ranks(ranks, scale, call, names)


@pytest.mark.parametrize("term", [*TERMS, "total"])
@pytest.mark.parametrize("call", [0, 1], ids=["empty_queue", "filled_queue"])
@pytest.mark.parametrize("scale", SCALES)
def test_averaged_gradients_equal_one_process(ranks, scale, call, term):
    assert_equal_on_all_ranks(ranks, scale, call, [f"d_{term}/{name}" for name in PARAMETERS])


def test_rows_come_in_rank_order_and_gradients_go_back_to_their_rank(ranks):
    for rank, own in zip(ranks, ([1.0, 2.0], [3.0, 4.0]), strict=True):
        assert rank["gathered"][:, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
        # Times the world size, which the average over ranks takes away.
        assert rank["gathered_grad"][:, 0].tolist() == [WORLD_SIZE * value for value in own]


@pytest.mark.parametrize("scale", SCALES)
def test_both_ranks_hold_the_newest_positives_of_all(ranks, scale):
    positives = F.normalize(make_rows()["view"], dim=1).float()
    for rank in ranks:
        # 12 rows went in, 8 stay. fp64 rows rounded to fp32.
        torch.testing.assert_close(
            rank[f"{scale}/queue"], positives.repeat(2, 1)[-8:], rtol=2e-7, atol=1e-8
        )
    assert torch.equal(ranks[0][f"{scale}/queue"], ranks[1][f"{scale}/queue"])
