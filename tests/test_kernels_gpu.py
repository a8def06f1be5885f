"""The fused operator on a GPU: as exact as its precision, deterministic, capturable, for every shape the format allows.

`-k sanitize` picks a few calls that reach every kernel, for compute-sanitizer.
"""

from __future__ import annotations

import pytest
import torch
from packing import random_packed

from eightfold.cuda import dense
from eightfold.cuda.gemm import MOST_WGMMA
from eightfold.cuda.weight import Weight
from eightfold.e8p import codebook
from eightfold.format import LayerSpec, PackedWeight, StageRecipe
from eightfold.linear import QuantLinear
from eightfold.quantize import dequantize
from eightfold.rotation import IN_FLOOR, OUT_FLOOR, layout_blocks, rotate

pytestmark = pytest.mark.gpu

SHAPES = [  # N, K
    (16, 576), (48, 960), (192, 1536), (200, 2560), (5376, 5376), (576, 11008), (192, 21504), (4096, 64), (1000, 4096),
]  # fmt: skip


def layer(
    n: int,
    k: int,
    bits: int,
    layout: str = "pow2-sum-256",
    bias: str | None = None,
    shards: int = 1,
    family: str = "e8p",
) -> QuantLinear:
    spec = LayerSpec(
        n, k, bits, layout_blocks(n, layout, OUT_FLOOR, shards), layout_blocks(k, layout, IN_FLOOR, shards), bias
    )
    return blocks_layer(spec, family)


def blocks_layer(spec: LayerSpec, family: str = "e8p") -> QuantLinear:
    return QuantLinear.from_packed(random_packed(spec, family=family).to("cuda"))


def exact(module: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """The equation of docs/format.md in float64: [tokens, N]."""
    packed = module.packed()
    weight = sum(
        ratio * codebook(stage).decode(codes).double().flatten(-2)
        for stage, ratio, codes in zip(packed.recipe.stages, packed.recipe.ratios, packed.codes, strict=True)
    )
    z = torch.nn.functional.pad(packed.scale_in.double() * x.double(), (0, packed.spec.padded_in - x.shape[-1]))
    y = rotate(rotate(z, packed.spec.in_blocks) @ weight.T, packed.spec.out_blocks)[..., : module.out_features]
    y = packed.scale_out.double() * y
    return y if packed.bias is None else y + packed.bias.double()


def plain(module: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """The same in PyTorch, in x's precision: the dense weight rounded, one product."""
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return torch.nn.functional.linear(x, dequantize(module.packed()).to(x.dtype), bias)


def check(module: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    for _ in range(2):  # what a kernel does not write stays NaN
        poison = torch.full((1 << 24,), float("nan"), device="cuda")
        del poison
    y = module(x)
    expected = exact(module, x)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    error, of_plain = (y.double() - expected).norm(), (plain(module, x).double() - expected).norm()
    assert error <= 2 * of_plain, f"error {error / expected.norm():.2e}, PyTorch's {of_plain / expected.norm():.2e}"
    assert torch.equal(y, module(x))
    if x.dtype != torch.float32:  # row after row of codes, or tiled
        assert torch.equal(QuantLinear.from_packed(module.packed()).prepare(x.dtype)(x), y)
    return y


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_shapes_and_rates(n, k, bits):
    module = layer(n, k, bits, bias="float16" if bits % 2 else None)
    for tokens in (1, 4, 7, 16, 20, 37, 200, 300, 640, 2048):
        if tokens * n * k > 1 << 35:  # the reference in float64 takes too long
            continue
        check(module, torch.randn(tokens, k, device="cuda").half())


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 15, 17, 33, 64, 65, 129, 640, 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("layout", ["pow2-sum-256", "pow2-sum-512"])
def test_tokens_and_dtypes(tokens, dtype, bits, layout):
    module = layer(768, 1152, bits, layout, bias="bfloat16")
    check(module, torch.randn(tokens, 1152, device="cuda").to(dtype))


SHORT = [  # inputs and outputs in blocks of up to 256
    ((16,) * 12, (16,) * 5),
    ((256, 64, 16, 8), (256, 4, 2, 1)),
    ((256, 256, 64) * 2, (128, 32, 16) * 2),
    ((8,) * 3, (1,) * 7),
    ((256,) * 4 + (32, 16, 8), (1, 256, 2, 128)),
    ((256,) * 5, (256,) * 3),
    ((128, 64), (64,) * 5 + (2,) * 8),
]


@pytest.mark.parametrize("tokens", [1, 6, 16, 300, 640, 2048])
@pytest.mark.parametrize(
    ("in_blocks", "out_blocks"),
    [
        *SHORT,
        ((512, 64), (512, 64)),
        ((8192,), (2048, 16)),
        ((32768,), (64,)),
        ((64,), (32768,)),
        ((16384, 4096, 64), (4096, 512, 16)),
        ((64, 2048, 256), (16, 1024, 32)),
    ],
)
def test_layouts(tokens, in_blocks, out_blocks):
    for bits in (2, 5):
        spec = LayerSpec(
            sum(out_blocks) - (3 if sum(out_blocks) > 16 else 0), sum(in_blocks) - 5, bits, out_blocks, in_blocks
        )
        check(blocks_layer(spec), torch.randn(tokens, spec.in_features, device="cuda").half())


@pytest.mark.parametrize(("in_blocks", "out_blocks"), SHORT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_dense_weights(in_blocks, out_blocks, dtype, bits):
    """What cuBLAS multiplies with, number by number; rows of a piece, padding as zeros and nothing else."""
    n, k = sum(out_blocks) - (3 if sum(out_blocks) > 16 else 0), sum(in_blocks) - 5
    module = blocks_layer(LayerSpec(n, k, bits, out_blocks, in_blocks)).prepare(dtype)
    weight = module_weight(module)
    if not dense.unrotates(weight, torch.cuda.current_device()):
        pytest.skip("shared memory has no room for a tile")
    expected = dequantize(module.packed()).double()
    middle = sum(out_blocks[: len(out_blocks) // 2])
    for begin, end in ((0, weight.padded_out), (0, middle), (middle, weight.padded_out)):
        rows = min(end, n) - begin
        if rows <= 0:
            continue
        memory = torch.full((rows + 2, -(-k // 8) * 8), float("nan"), dtype=dtype, device="cuda")
        dense._unrotate(weight, (begin, end), memory[1:-1], torch.cuda.current_stream().cuda_stream)
        found, exact_rows = memory[1:-1, :k].double(), expected[begin : begin + rows]
        rounded = (exact_rows.to(dtype).double() - exact_rows).norm()
        assert (found - exact_rows).norm() <= 2.5 * rounded
        rms = exact_rows.square().mean(1, keepdim=True).sqrt()
        assert ((found - exact_rows).abs() <= 8 * torch.finfo(dtype).eps * rms).all()
        assert (memory[1:-1, k:] == 0).all()
        assert memory[[0, -1]].isnan().all()


def module_weight(module: QuantLinear) -> Weight:
    codes, ratios, *rest = module.arguments()
    return Weight(codes, ratios.cuda(), *rest)


@pytest.mark.parametrize("bias", [None, "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pieces_and_biases_of_dense_products(bias, dtype, monkeypatch):
    """Pieces of rows one after another in the same memory."""
    module, tokens = layer(1000, 1083, 4, bias=bias), MOST_WGMMA + 1
    x = torch.randn(tokens, 1083, device="cuda").to(dtype)
    whole = check(module, x)
    monkeypatch.setattr(dense, "even_rows", lambda *sizes: 256)
    pieces = check(module, x)
    error = (pieces.double() - whole.double()).norm()
    assert error <= 4 * torch.finfo(dtype).eps * whole.double().norm()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_row_for_every_word(bits):
    """Output heads: many rows, none rotated."""
    n = 262144 + 16
    module = blocks_layer(LayerSpec(n, 320, bits, (1,) * n, layout_blocks(320, "pow2-sum-256", IN_FLOOR)))
    for tokens in (1, 5, 16, 40, 300, 520):
        check(module, torch.randn(tokens, 320, device="cuda").bfloat16())


@pytest.mark.parametrize(("n", "k"), [(16, 576), (200, 2560), (5376, 5376), (1000, 4096)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_shells(n, k, bits):
    module = layer(n, k, bits, bias="float16" if bits % 2 else None, family="e8shell")
    for tokens in (1, 7, 48, 640, 2048):
        if tokens * n > 100:  # enough outputs for an error: the dense product rounds three times, PyTorch's once
            check(module, torch.randn(tokens, k, device="cuda").half())
    check(module, torch.randn(3, k, device="cuda").bfloat16())
    check(module, torch.randn(3, k, device="cuda"))
    assert module(torch.empty(0, k, device="cuda").half()).shape == (0, n)


@pytest.mark.parametrize(
    ("in_blocks", "out_blocks"), [((32, 8), (128, 64, 8)), ((64, 64, 64, 8), (4, 2, 1)), ((16,), (512,))]
)
def test_shells_in_layouts_of_glq(in_blocks, out_blocks):
    module = blocks_layer(LayerSpec(sum(out_blocks), sum(in_blocks), 5, out_blocks, in_blocks), "e8shell")
    for tokens in (48, 300):  # enough outputs for an error
        check(module, torch.randn(tokens, sum(in_blocks), device="cuda").half())


@pytest.mark.parametrize("tokens", [1, 100])
def test_shells_in_a_graph(tokens):
    module = layer(192, 576, 3, family="e8shell").prepare(torch.float16)
    x = torch.randn(tokens, 576, device="cuda").half()
    layer(192, 576, 2)(torch.randn(64, 576, device="cuda").half())  # cuBLAS wants its workspace before a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    graph.replay()
    assert torch.equal(y, module(x))


@pytest.mark.parametrize("stages", [("e81b", "e8p"), ("e8p", "e8shell"), ("e8shell256", "e8shell")])
def test_mixed_stages_go_through_the_reference(stages):
    packed = random_packed(LayerSpec(48, 192, sum(codebook(s).bits for s in stages) // 8, (32, 16), (128, 64)))
    recipe = StageRecipe(stages, (1.0, 0.3))
    codes = tuple(torch.randint(0, 1 << b.bits, (48, 24)).to(b.dtype) for b in recipe.codebooks)
    mixed = PackedWeight(packed.spec, recipe, codes, packed.scale_in, packed.scale_out)
    module, x = QuantLinear.from_packed(mixed.to("cuda")), torch.randn(3, 192, device="cuda").half()
    expected = exact(module, x)
    assert (module(x).double() - expected).norm() <= 1e-3 * expected.norm()


def test_float32_goes_through_the_reference():
    module = layer(200, 576, 3, bias="float32")
    check(module, torch.randn(5, 576, device="cuda"))


def test_shapes_of_x():
    module = layer(192, 576, 4)
    x = torch.randn(2, 3, 4, 576, device="cuda").half()
    y = module(x)
    assert torch.equal(y.view(-1, 192), module(x.view(-1, 576)))
    assert module(x[0, 0, 0]).shape == (192,)
    assert torch.equal(module(x[0, 0, 0]), module(x[0, 0, :1])[0])
    for empty in (x[:0], x[:, :0], x[0, 0, :0]):
        assert module(empty).shape == (*empty.shape[:-1], 192)
    wide = torch.randn(8, 2 * 576, device="cuda").half()
    for view in (
        wide[:, ::2],
        wide[:, 5 : 5 + 576],
        wide[::2, 576:],
        wide.T.contiguous().T[:, :576],
        wide[:1, :576].expand(6, -1),
        wide[:1, 576:],  # one token, which is copied as a whole
        wide[:1, 5 : 5 + 576],  # or not, where it is not aligned
    ):
        assert torch.equal(module(view), module(view.contiguous()))


def test_a_token_does_not_depend_on_its_batch():
    module = layer(768, 1152, 3)
    x = torch.randn(16, 1152, device="cuda").half()
    for group in ((2, 3, 4, 5, 6, 7, 8), (9, 12, 16), (17, 25, 32), (33, 64), (65, 128), (129, 256)):
        rows = [module(torch.cat([x[:1], torch.randn(n - 1, 1152, device="cuda").half() * 9]))[0] for n in group]
        assert all(torch.equal(row, rows[0]) for row in rows)
    together = module(torch.cat([x, x]))
    assert torch.equal(together[:16], together[16:])


def test_values_at_the_edges():
    module = layer(192, 576, 2)
    assert torch.equal(module(torch.zeros(3, 576, device="cuda").half()), torch.zeros(3, 192, device="cuda").half())
    tiny = torch.full((1, 576), 6e-8, device="cuda").half()
    assert torch.isfinite(module(tiny)).all()
    huge = torch.zeros(1, 576, device="cuda").half()
    huge[0, 3] = 60000
    check(module, huge * 1e-3)
    check(module, huge.bfloat16())
    for bad in (float("nan"), float("inf")):
        for tokens in (2, 40):
            x = torch.randn(tokens, 576, device="cuda").half()
            x[1, 100] = bad
            y = module(x)
            assert torch.isfinite(y[[0, *range(2, tokens)]]).all()
            assert not torch.isfinite(y[1]).all()


def test_streams_and_threads():
    from concurrent.futures import ThreadPoolExecutor

    module = layer(768, 1152, 4).prepare(torch.float16)
    xs = [torch.randn(n, 1152, device="cuda").half() for n in (1, 3, 8, 16, 1, 2, 20, 100)]
    expected = [module(x) for x in xs]
    torch.cuda.synchronize()

    def run(x):
        with torch.cuda.stream(torch.cuda.Stream()):
            ys = [module(x) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return ys

    with ThreadPoolExecutor(8) as pool:
        for ys, y in zip(pool.map(run, xs), expected, strict=True):
            assert all(torch.equal(each, y) for each in ys)


@pytest.mark.parametrize("tokens", [1, 8, 16, 48, 300, 2048])
def test_graph_capture(tokens):
    modules = torch.nn.Sequential(layer(1152, 768, 3), layer(768, 1152, 4)).eval()
    for module in modules:
        module.prepare(torch.float16)
    x = torch.randn(tokens, 768, device="cuda").half() * 0.05
    modules(torch.randn_like(x))  # cuBLAS wants its workspace before a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = modules(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x) * 0.05)
        graph.replay()
        assert torch.equal(y, modules(x))


def test_capture_needs_preparation_only():
    module = layer(304, 4416, 6).prepare(torch.bfloat16)  # no call before the capture
    x = torch.randn(1, 4416, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    graph.replay()
    assert torch.equal(y, module(x))


def test_compile_to_one_node():
    module = layer(192, 576, 3, bias="float16").prepare(torch.float16)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (3, 5, 40):
        x = torch.randn(tokens, 576, device="cuda").half()
        assert torch.equal(compiled(x), module(x))
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == ["eightfold.linear"]


@pytest.mark.parametrize("tokens", [1, 3, 40, 100])
def test_opcheck(tokens):
    module = layer(192, 576, 3, bias="float16")
    x = torch.randn(tokens, 576, device="cuda").half()
    codes, ratios, *vectors, in_blocks, out_blocks = module.arguments()
    arguments = (x, [c.detach() for c in codes], ratios.cuda(), *(v.detach() for v in vectors))
    torch.library.opcheck(torch.ops.eightfold.linear, (*arguments, module.bias.detach(), in_blocks, out_blocks))


def test_gradient_of_the_input():
    module = layer(192, 576, 3).prepare(torch.float16)
    x = torch.randn(4, 576, device="cuda").half().requires_grad_()
    module(x).float().sum().backward()
    expected = plain(module, torch.eye(576, device="cuda").half()).float().sum(1)
    torch.testing.assert_close(x.grad[0].float(), expected, rtol=1e-2, atol=0.3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices():
    module = layer(192, 576, 3)
    x = torch.randn(4, 576, device="cuda:0").half()
    expected = module(x)
    assert torch.equal(module.to("cuda:1")(x.to("cuda:1")).cpu(), expected.cpu())


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_sanitize(bits):
    for n, k in ((200, 576), (48, 960)):
        module = layer(n, k, bits, bias="float16")
        for tokens in (1, 8, 16, 33, 200, 640, 2048):
            module(torch.randn(tokens, k, device="cuda").half())
    for in_blocks, out_blocks in SHORT:
        spec = LayerSpec(sum(out_blocks), sum(in_blocks) - 5, bits, out_blocks, in_blocks)
        blocks_layer(spec)(torch.randn(2048, spec.in_features, device="cuda").half())
    spec = LayerSpec(520, 1080, bits, (512, 8), (1024, 64))
    for tokens in (1, 8, 640, MOST_WGMMA + 1):
        blocks_layer(spec)(torch.randn(tokens, 1080, device="cuda").half())
    torch.cuda.synchronize()
