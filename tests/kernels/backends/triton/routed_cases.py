"""The float64 truth of calls whose gates a token router makes."""

import torch
from cases import TOLERANCE, assert_close

from saml_kernels.backends import reference

NAMES = ("y", "dx", "da", "db", "drouter")


def make_router(case, seed, top_k, temperature):
    """A router whose k-th and next largest logits are well apart in every row of the case."""
    g = torch.Generator().manual_seed(seed)
    shape = case.lora_a.shape[:-2] + case.lora_a.shape[-1:]
    k = shape[-1]
    router = (torch.randn(*shape, generator=g) * (2 / k) ** 0.5).to(case.x).contiguous()
    kept = top_k or shape[-2]
    if kept < shape[-2] and len(case.x):
        index = None if case.speakers is None else case.speakers.cpu()
        gates = reference.route(case.x.double().cpu(), router.double().cpu(), None, 1.0, index)
        logits = gates.log().sort(-1, descending=True).values
        clear = (logits[:, kept - 1] - logits[:, kept]) > 0.05
        case.x[(~clear).to(case.x.device)] = 0  # all logits equal: no gradient tells them apart
        case.dy[(~clear).to(case.x.device)] = 0
    return router


def truth(case, router, top_k, temperature, absolute=False):
    """y, dx, da, db, drouter in float64 by autograd; `absolute` as in cases.truth."""

    def wide(tensor):
        return tensor.detach().double().cpu()

    index = None if case.speakers is None else case.speakers.cpu()
    x, a, b, v = (wide(t).requires_grad_() for t in (case.x, case.lora_a, case.lora_b, router))
    dense, bias = wide(case.weight.dequantize()), None if case.bias is None else wide(case.bias)
    dy = wide(case.dy)
    gates = reference.route(x, v, top_k, temperature, index)
    if absolute:
        gates = gates.detach()
        dense, dy = dense.abs(), dy.abs()
        bias = None if bias is None else bias.abs()
        x, a, b = (t.detach().abs().requires_grad_() for t in (x, a, b))
        gates.requires_grad_()
    y = torch.zeros(len(x), len(dense), dtype=torch.float64) + 0 * x.sum()
    for s in range(1 if index is None else len(a)):
        own = (a, b) if index is None else (a[s], b[s])
        part = reference.saml_linear_reference(x, dense, *own, gates, bias, case.scaling)
        mine = torch.ones(len(x), dtype=torch.bool) if index is None else index == s
        y = torch.where(mine.unsqueeze(1), part, y)
    y.backward(dy)
    if absolute:  # what the logits' gradient sums up, then the router's own product
        flow = gates * gates.grad * 2 / temperature
        people = torch.zeros(len(x), dtype=torch.long) if index is None else index.long()
        dv = torch.zeros(*wide(router).reshape(-1, *router.shape[-2:]).shape, dtype=torch.float64)
        for s in range(len(dv)):
            mine = people == s
            dv[s] = flow[mine].detach().T @ x[mine].detach()
        full = wide(router).abs().reshape(dv.shape)
        dx = x.grad + torch.einsum("me,mek->mk", flow.detach(), full[people])
        return y.detach(), dx, a.grad, b.grad, dv.reshape(router.shape)
    zero = (torch.zeros_like(t) if t.grad is None else t.grad for t in (x, a, b, v))
    return y.detach(), *zero


def check_answers(case, router, top_k, temperature, found):
    """y, dx, da, db, drouter against the truth."""
    expected = truth(case, router, top_k, temperature)
    sizes = truth(case, router, top_k, temperature, absolute=True)
    for name, tensor, wanted, size in zip(NAMES, found, expected, sizes, strict=True):
        assert tensor is not None and tensor.dtype == case.x.dtype
        assert_close(tensor, wanted, 2 * TOLERANCE[case.x.dtype], name, size)
