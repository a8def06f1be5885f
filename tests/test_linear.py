from __future__ import annotations

import copy

import pytest
import torch
from packing import random_packed, spec
from torch import nn

from eightfold.e8p import codebook
from eightfold.linear import QuantLinear, _on_gpu
from eightfold.quantize import dequantize
from eightfold.rotation import rotate

OP = torch.ops.eightfold.linear


def arguments(module: QuantLinear, x: torch.Tensor) -> tuple:
    packed = module.packed()
    return (
        x,
        list(packed.codes),
        module._ratios.to(x.device),
        packed.scale_in,
        packed.scale_out,
        packed.bias,
        *module._blocks,
    )


def module_for(out_features: int = 40, in_features: int = 72, bits: int = 3, **more) -> QuantLinear:
    return QuantLinear.from_packed(random_packed(spec(out_features, in_features, bits, **more)))


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_equation(bits):
    """y = s_out ∘ cut(R_outᵀ(W_hat · R_in(pad(s_in ∘ x)))) + bias, step by step."""
    module = module_for(bits=bits, bias="float32")
    packed, x = module.packed(), torch.randn(5, 72)
    z = torch.nn.functional.pad(packed.scale_in.float() * x, (0, packed.spec.padded_in - 72))
    W_hat = sum(
        ratio * codebook(stage).decode(codes).flatten(-2)
        for stage, ratio, codes in zip(packed.recipe.stages, packed.recipe.ratios, packed.codes, strict=True)
    )
    y = rotate(rotate(z, packed.spec.in_blocks) @ W_hat.T, packed.spec.out_blocks)[:, :40]
    y = packed.scale_out.float() * y + packed.bias
    torch.testing.assert_close(module(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(72,), (0, 72), (3, 72), (2, 3, 72), (2, 0, 3, 72)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prepared", [False, True])
def test_any_leading_dimensions_and_dtype(shape, dtype, prepared):
    module = module_for(bias="bfloat16")
    if prepared:
        module.prepare(dtype)
    x = torch.randn(shape).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], 40)
    assert y.is_contiguous()
    W = dequantize(module.packed())
    expected = x.float() @ W.T + module.bias.float()
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=5e-2)


def test_strided_input():
    module = module_for()
    x = torch.randn(72, 6).T
    torch.testing.assert_close(module(x), module(x.contiguous()))
    wide = torch.randn(4, 144)[:, ::2]
    torch.testing.assert_close(module(wide), module(wide.contiguous()))


@pytest.mark.parametrize("bias", [None, "float16"])
@pytest.mark.parametrize("shape", [(72,), (0, 72), (2, 3, 72)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(bias, shape, dtype):
    torch.library.opcheck(OP, arguments(module_for(bits=5, bias=bias), torch.randn(shape).to(dtype)))


def test_the_fake_needs_no_data():
    module = QuantLinear(spec(40, 72, 3), random_packed(spec(40, 72, 3)).recipe, device="meta")
    y = OP(*arguments(module, torch.empty(2, 7, 72, device="meta", dtype=torch.bfloat16)))
    assert (y.shape, y.dtype, y.device.type) == ((2, 7, 40), torch.bfloat16, "meta")


def test_compiles_to_one_node():
    module = module_for()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x = torch.randn(2, 72)
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), module(x))
    torch.testing.assert_close(compiled(torch.randn(5, 72)).shape, torch.Size((5, 40)))
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == ["eightfold.linear"]


def test_parameters_are_the_tensors_of_the_file():
    packed = random_packed(spec(40, 72, 5, "bfloat16"))
    module = QuantLinear.from_packed(packed)
    named = dict(module.named_parameters())
    assert named.keys() == packed.tensors().keys() == module.state_dict().keys()
    for name, tensor in packed.tensors().items():
        assert named[name].data_ptr() == tensor.data_ptr()
        assert not named[name].requires_grad
    assert not dict(module.named_buffers())
    module.prepare()
    assert module.state_dict().keys() == named.keys()


def test_a_cast_of_the_module_leaves_files_values_alone():
    packed = random_packed(spec(40, 72, 3, "float32"))
    before = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    for cast in ("half", "bfloat16", "double", "float", "cpu"):
        model = nn.Sequential(QuantLinear.from_packed(packed))
        getattr(model, cast)()
        after = model[0].packed().tensors()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor)


def test_prepared_weight_follows_casts():
    module = module_for().prepare(torch.float32)
    module.to(torch.bfloat16)
    assert module._dense is not None
    assert module._dense.dtype == torch.bfloat16
    assert torch.equal(module._dense, dequantize(module.packed()).bfloat16())
    module.to(torch.float32)  # from the codes, not from the rounded weight
    assert torch.equal(module._dense, dequantize(module.packed()))
    module(torch.randn(2, 72).half())  # activations of another dtype
    assert module._dense.dtype == torch.float16


def test_prepare_and_release():
    module = module_for()
    assert not module.prepared
    x = torch.randn(3, 72)
    slow = module(x)
    assert module.prepare().prepared
    torch.testing.assert_close(module(x), slow)
    module.release()
    assert torch.equal(module(x), slow)
    module.prepare().to("meta")
    assert not module.prepared
    with pytest.raises(ValueError, match="meta"):
        module.prepare()


def test_gradients_reach_the_input_of_a_prepared_layer():
    module = module_for().prepare()
    x = torch.randn(3, 72, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, dequantize(module.packed()).sum(0).expand(3, -1))


def test_copies():
    module = module_for().prepare()
    x = torch.randn(3, 72)
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_built_under_meta():
    packed = random_packed(spec(40, 72, 3))
    with torch.device("meta"):
        module = QuantLinear(packed.spec, packed.recipe)
    assert all(parameter.is_meta for parameter in module.parameters())
    for name, tensor in packed.tensors().items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    x = torch.randn(3, 72)
    assert torch.equal(module(x), QuantLinear.from_packed(packed)(x))


@pytest.mark.gpu
def test_cuda_is_the_cpu():
    module = module_for(bits=5, bias="bfloat16")
    x = torch.randn(4, 72)
    y = module(x)
    module.prepare().cuda()
    assert module._dense is not None
    assert module._dense.is_cuda
    torch.testing.assert_close(module(x.cuda()).cpu(), y, rtol=1e-4, atol=1e-4)
    module.release()
    torch.testing.assert_close(module(x.cuda()).cpu(), y, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(OP, arguments(module, x.cuda()))


def test_loading_other_values_prepares_anew():
    module, other = module_for().prepare(), QuantLinear.from_packed(random_packed(spec(40, 72, 3), seed=1))
    module.load_state_dict(other.state_dict())
    x = torch.randn(3, 72)
    assert module.prepared
    torch.testing.assert_close(module(x), other(x))


def test_tensors_that_do_not_belong_together_are_refused():
    """By the operator's way to the kernels, which would read them by address."""
    x, *rest = arguments(module_for(), torch.randn(3, 72))
    with pytest.raises(ValueError, match=r"expected 72 input features, got \[3, 64\]"):
        _on_gpu(x[:, :64], *rest)
    with pytest.raises(ValueError, match="expected all on meta"):
        _on_gpu(x.to("meta"), *rest)
    assert torch.equal(_on_gpu(x, *rest), OP(x, *rest))  # no kernels here: the reference
