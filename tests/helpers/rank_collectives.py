"""What each rank of tests/parallel/test_collectives.py does."""

import functools

import numpy as np
import torch
import torch.distributed as dist

from flux_func.parallel import collectives

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "all_to_all of pairs", "ring_permute")


def draw(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def collective(kind, group, dims, shift=1):
    """The collective as a function of x alone; dims are what it works along."""
    return {
        "all_gather": lambda x: collectives.all_gather(x, dims[0], group),
        "reduce_scatter": lambda x: collectives.reduce_scatter(x, dims[0], group),
        "all_reduce": lambda x: collectives.all_reduce(x, group),
        "all_to_all": lambda x: collectives.all_to_all(x, *dims, group),
        "all_to_all of pairs": lambda x: collectives.all_to_all(x, *dims, group, among=2),
        "ring_permute": lambda x: collectives.ring_permute(x, shift, group),
    }[kind]


def expected(kind, rank, xs, dims, shift=1):
    """What `collective` should return on a rank, computed from every rank's x."""
    n, first = len(xs), rank - rank % 2
    return {
        "all_gather": lambda: torch.cat(xs, dims[0]),
        "reduce_scatter": lambda: sum(xs).chunk(n, dims[0])[rank],
        "all_reduce": lambda: sum(xs),
        "all_to_all": lambda: torch.cat([x.chunk(n, dims[0])[rank] for x in xs], dims[1]),
        "all_to_all of pairs": lambda: torch.cat(
            [x.chunk(2, dims[0])[rank - first] for x in xs[first : first + 2]], dims[1]
        ),
        "ring_permute": lambda: xs[(rank - shift) % n],
    }[kind]()


def largest_errors(rank, cases):
    """The largest errors of each case (kind, shape, dims, shift): value, transpose, jvp, vmap."""
    group, world = dist.group.WORLD, dist.get_world_size()
    found = []
    for seed, (kind, shape, dims, shift) in enumerate(cases):
        fn = collective(kind, group, dims, shift)
        want = functools.partial(expected, kind, rank, dims=dims, shift=shift)
        xs, ts = ([draw((seed, part, r), shape) for r in range(world)] for part in (0, 1))
        out, pull = torch.func.vjp(fn, xs[rank])
        y = draw((seed, 2, rank), out.shape)
        # <A x, y> = <x, A^T y>, summed over the ranks.
        sides = torch.stack([(out * y).sum(), (xs[rank] * pull(y)[0]).sum()])
        dist.all_reduce(sides)
        _, tangent = torch.func.jvp(fn, (xs[rank],), (ts[rank],))
        both = torch.func.vmap(fn, in_dims=1, out_dims=1)(torch.stack([xs[rank], ts[rank]], 1))
        found.append(
            (
                (out - want(xs=xs)).abs().max().item(),
                (sides[0] - sides[1]).abs().item(),
                (tangent - want(xs=ts)).abs().max().item(),
                (both - torch.stack([want(xs=xs), want(xs=ts)], 1)).abs().max().item(),
            )
        )
    return found


def _loss(fn, x, weight):
    # Not linear, so that the second derivatives do not vanish.
    return (fn(x.sin()).square() * weight).sum()


def _closed_loss(kind, dims, weights, xs):
    sines = [x.sin() for x in xs]
    return sum((expected(kind, r, sines, dims).square() * w).sum() for r, w in enumerate(weights))


def derivatives(rank, shape, dims):
    """The errors, by collective and name, of derivatives of the ranks' summed loss against one process's."""
    return {kind: _derivatives(rank, kind, shape, dims) for kind in KINDS}


def _derivatives(rank, kind, shape, dims):
    group, world = dist.group.WORLD, dist.get_world_size()
    fn = collective(kind, group, dims)
    xs, vs = (torch.stack([draw((part, r), shape) for r in range(world)]) for part in (0, 1))
    weights = [draw((2, r), expected(kind, 0, list(xs), dims).shape) for r in range(world)]
    closed = functools.partial(_closed_loss, kind, dims, weights)
    loss = functools.partial(_loss, fn, weight=weights[rank])
    x, v = xs[rank], vs[rank]
    grad = torch.func.grad(loss)
    found = {
        "grad": grad(x),
        "jvp(grad)": torch.func.jvp(grad, (x,), (v,))[1],
        "vmap(grad)": torch.func.vmap(grad)(x[None])[0],
        "autograd": torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)[0],
        "compiled": torch.autograd.grad(
            torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf := x.clone().requires_grad_()), leaf
        )[0],
        # Every rank differentiates its part of <grad, v>: together they are the Hessian's product.
        "grad(grad)": torch.func.grad(lambda x: (grad(x) * v).sum())(x),
        "grad(jvp)": torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (v,))[1])(x),
    }
    hessian = torch.func.jvp(torch.func.grad(closed), (xs,), (vs,))[1][rank]
    second = ("jvp(grad)", "grad(grad)", "grad(jvp)")
    first = torch.func.grad(closed)(xs)[rank]
    return {name: (value - (hessian if name in second else first)).abs().max().item() for name, value in found.items()}


def counted(rank, shape):
    """The bytes that a tally counts, for each collective with its transpose."""
    group = dist.group.WORLD
    found = {}
    for kind in KINDS:
        x = draw(0, shape).requires_grad_()
        with collectives.tally() as tally:
            torch.autograd.grad(collective(kind, group, (0, 1))(x).sum(), x)
        found[kind] = {name: sent for (name, of), sent in tally.items() if of == group.group_name}
    return found


def in_flight(rank, rows):
    """What the starting functions return."""
    group = dist.group.WORLD
    x = draw(rank, (rows * group.size(), 3))
    starts = (collectives.start_all_gather, collectives.start_reduce_scatter, collectives.start_all_reduce)
    return [collectives.wait(start(x, group)).numpy() for start in starts]


def counted_in_a_fake_world(rank, world):
    """The bytes that a gather and its transpose would send among so many processes, of which this is the only one."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    with FakeTensorMode(), collectives.tally() as tally:
        x = torch.ones(4, requires_grad=True)
        torch.autograd.grad(collectives.all_gather(x, 0, dist.group.WORLD).sum(), x)
    return {kind: sent for (kind, _), sent in tally.items()}
