"""What each rank of tests/parallel/test_attention.py does."""

import contextlib

import numpy as np
import torch
import torch.distributed as dist

from flux_func.models import kernels, layers
from flux_func.parallel import attention, collectives
from flux_func.parallel import mesh as meshes

HEADS, HEAD = 8, 6


def draw(lengths, dtype=torch.float64, batch=2):
    """q, k, v and the output's cotangent [batch, HEADS, text + image, HEAD], the same on every rank."""
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.standard_normal((batch, HEADS, sum(lengths), HEAD))).to(dtype) for _ in range(4)]


def local(x, lengths, rank, world):
    """A rank's share of x [B, H, text + image, D]: its chunk of the text, then its chunk of the image."""
    return torch.cat([part.chunk(world, 2)[rank] for part in x.split(lengths, 2)], 2)


def whole(shares, lengths):
    """The inverse of `local`, of every rank's share."""
    parts = zip(*(share.split([length // len(shares) for length in lengths], 2) for share in shares), strict=True)
    return torch.cat([torch.cat(part, 2) for part in parts], 2)


def context_mesh():
    return meshes.build({"replicate": 1, "shard": 1, "context": dist.get_world_size()})


def plain(q, k, v, cotangent):
    """Output [B, H, L, D] and gradients of q, k, v by products and a softmax, in the type of q."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = (leaves[0] @ leaves[1].mT * HEAD**-0.5).softmax(-1) @ leaves[2]
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def split(out):
    """[B, l, H*D] to [B, H, l, D]."""
    return out.unflatten(-1, (HEADS, HEAD)).transpose(1, 2)


def results(rank, cases):
    """This rank's output and gradients for each case (kind, ulysses, lengths, dtype)."""
    mesh, found = context_mesh(), []
    for kind, ulysses, lengths, dtype in cases:
        attend = attention.context_attention(kind, mesh, HEADS, ulysses)
        *qkv, cotangent = (local(x, lengths, rank, mesh.size()) for x in draw(lengths, dtype))
        with torch.no_grad():
            once = attend(*qkv)
        # As where a stage is recomputed: with a graph only the second time.
        out = attend(*(leaves := [x.requires_grad_() for x in qkv]))
        assert torch.equal(once, out), "another result with a graph"
        # A cotangent without memory of its own, as sum's is.
        loose, packed = (
            torch.autograd.grad(out, leaves, c, retain_graph=True)
            for c in (torch.ones((), dtype=dtype).expand(out.shape), torch.ones_like(out))
        )
        assert all(torch.equal(a, b) for a, b in zip(loose, packed, strict=True)), "strides changed the gradients"
        out = split(out)
        grads = torch.autograd.grad(out, leaves, cotangent)
        out = out.detach()
        found.append([x.double().numpy() for x in (out, *grads)])
    return found


def counted(rank, cases):
    """The bytes that this rank sends forward and backward for each case (kind, ulysses, lengths, dtype)."""
    mesh, found = context_mesh(), []
    for kind, ulysses, lengths, dtype in cases:
        attend = attention.context_attention(kind, mesh, HEADS, ulysses)
        leaves = [local(x, lengths, rank, mesh.size()).requires_grad_() for x in draw(lengths, dtype)[:3]]
        with collectives.tally() as there:
            out = attend(*leaves)
        with collectives.tally() as back:
            torch.autograd.grad(out.sum(), leaves)
        found.append(tuple({name: sent for (name, _), sent in tally.items()} for tally in (there, back)))
    return found


def products(rank, rows):
    """The ring's results where a device has no kernel, with so many queries at once."""
    kernels._kernel, kernels.ROWS = lambda q, k, asked: "products", rows
    [found] = results(rank, [("ring", -1, (4, 12), torch.float64)])
    return found


def transforms(rank, cases):
    """Errors of torch.func's transforms and of torch.compile for each case (kind, ulysses), against one process."""
    mesh, lengths = context_mesh(), (4, 8)
    return {case: _transforms(mesh, lengths, *case) for case in cases}


def _transforms(mesh, lengths, kind, ulysses):
    attend = attention.context_attention(kind, mesh, HEADS, ulysses)
    *full, weight = draw(lengths)
    full_tangent = full[::-1]
    mine = [local(x, lengths, mesh.rank, mesh.size()) for x in (*full, weight)]
    tangent = mine[2::-1]

    def total(attend, weight, q, k, v):
        return (split(attend(q, k, v)).square() * weight).sum()

    def loss(q, k, v):
        return total(attend, mine[3], q, k, v)

    def reference(q, k, v):
        return total(layers.attention, weight, q, k, v)

    def errors(found, expected):
        expected = [local(x, lengths, mesh.rank, mesh.size()) for x in expected]
        return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))

    grad, expected_grad = (torch.func.grad(fn, argnums=(0, 1, 2)) for fn in (loss, reference))
    found = {"grad": errors(grad(*mine[:3]), expected_grad(*full))}
    leaves = [x.clone().requires_grad_() for x in mine[:3]]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves)
    found["compiled"] = errors(torch.autograd.grad(compiled, leaves), expected_grad(*full))
    if kind == "ring" or ulysses not in (-1, mesh.size()):
        return found | {"refused": _refusals(loss, grad, mine[:3], tangent)}
    value = torch.func.jvp(loss, tuple(mine[:3]), tuple(tangent))[1]
    dist.all_reduce(value)
    found["jvp"] = abs(value - torch.func.jvp(reference, tuple(full), tuple(full_tangent))[1]).item()
    second, expected = (
        torch.func.jvp(fn, tuple(at), tuple(along))[1]
        for fn, at, along in ((grad, mine[:3], tangent), (expected_grad, full, full_tangent))
    )
    found["jvp(grad)"] = errors(second, expected)
    second = torch.func.grad(
        lambda *at: sum((g * t).sum() for g, t in zip(grad(*at), tangent, strict=True)), argnums=(0, 1, 2)
    )(*mine[:3])
    found["grad(grad)"] = errors(second, expected)
    return found


def _refusals(loss, grad, qkv, tangent):
    """What the derivatives that a ring has not are answered with."""
    lines = []
    for call in (
        lambda: torch.func.jvp(loss, tuple(qkv), tuple(tangent)),
        lambda: torch.func.vmap(loss)(*(x[None] for x in qkv)),
        lambda: torch.func.grad(lambda q: grad(q, *qkv[1:])[0].sum())(qkv[0]),
    ):
        with contextlib.suppress(NotImplementedError):
            call()
            lines.append("nothing")
            continue
        try:
            call()
        except NotImplementedError as error:
            lines.append(str(error))
    return lines
