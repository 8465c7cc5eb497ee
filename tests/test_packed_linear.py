"""Packed layers against dense ones: the same function, nothing held twice, everything given back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec.build import build_engine
from specdec.errors import ConfigError, UnsupportedError
from specdec.packed_linear import PackedEmbedding, PackedLinear, pack_linears, packing_obstacle, unpack_linears
from specdec.types import Request, SamplingParams

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(64, 64), (1, 1), (100, 33), (130, 257), (257, 31), (704, 256)]


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32, hidden: int = 64) -> LlamaForCausalLM:
    """Its matrices are wide enough to be packed in bfloat16, and in float32 the larger ones."""
    config = LlamaConfig(
        vocab_size=4200, hidden_size=hidden, intermediate_size=4200, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(config).to(dtype).eval()


def ids(*, count: int = 9) -> torch.Tensor:
    return torch.arange(5, 5 + 37 * count, 37)[None]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_is_as_near_to_float64_as_a_dense_one(num_out, num_in, bias, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(num_in, num_out, bias=bias)).to(dtype)
    exact = copy.deepcopy(model).double()
    for num_rows in (1, 2, 3, 17, 33):
        x = torch.randn(2, num_rows, num_in).to(dtype)
        with torch.no_grad():
            wanted = exact(x.double())
            dense_error = (model(x).double() - wanted).abs().max()
            pack_linears(model, "test", strict=True)
            got = model(x)
            unpack_linears(model, "test")
        assert got.shape == (2, num_rows, num_out)
        # oneDNN adds the K products one by one, MKL in several sums: one rounding of the sum of their sizes.
        sizes = nn.functional.linear(x.double().abs(), exact[0].weight.abs())
        rounding = sizes.max() * torch.finfo(torch.float32).eps
        assert (got.double() - wanted).abs().max() <= 2 * dense_error + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), [(100, 33), (256, 704), (512, 2048), (896, 4864)])
def test_strict_rows_do_not_depend_on_how_many_there_are(num_out, num_in, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(num_in, num_out)).to(dtype)
    pack_linears(model, "test", strict=True)
    x = torch.randn(70, num_in).to(dtype)
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in x])
        for num_rows in (2, 3, 8, 17, 33, 64, 70):
            for first in (0, 70 - num_rows):
                assert torch.equal(model(x[first : first + num_rows]), alone[first : first + num_rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_everything_comes_back_bit_for_bit(tied, dtype):
    model = llama(tied=tied, dtype=dtype)
    before, parameters = state(model), dict(model.named_parameters())
    kinds = [type(module) for module in model.modules()]
    assert pack_linears(model, "test") > 0
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    packed = state(model)
    assert packed.keys() == before.keys()
    assert all(torch.equal(packed[name], value) for name, value in before.items())
    unpack_linears(model, "test")
    assert [type(module) for module in model.modules()] == kinds
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items()), "the same objects, as before"
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_is_held_twice(dtype):
    for tied in (False, True):
        model = llama(tied=tied, dtype=dtype)
        layers = [module for module in model.modules() if type(module) is nn.Linear]
        pack_linears(model, "test")
        packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
        freed = [layer for layer in layers if layer.weight.numel() == 0]
        assert packed, "otherwise this test says nothing"
        assert len(freed) == len(packed)
        assert isinstance(model.get_input_embeddings(), PackedEmbedding if tied else nn.Embedding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_reads_its_rows_from_the_packed_matrix(dtype):
    model = llama(tied=True, dtype=dtype)
    every = torch.arange(4200).view(3, 1400)
    wanted = model.get_input_embeddings()(every)
    pack_linears(model, "test")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert torch.equal(embedding(every), wanted)
    assert embedding(every[:0]).shape == (0, 1400, 64)
    for bad in (-1, 4200):
        with pytest.raises(IndexError, match=r"ids must be in \[0, 4200\)"):
            embedding(torch.tensor([bad]))


def test_an_embedding_that_scales_keeps_its_dense_matrix_and_shares_it():
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2

    model = nn.ModuleDict({"embed": Scaled(5000, 64), "head": nn.Linear(64, 5000, bias=False)})
    model["head"].weight = model["embed"].weight
    x = torch.randn(3, 64)
    wanted, rows = model["head"](x), model["embed"](torch.arange(9))
    pack_linears(model, "test")
    assert model["head"].weight is model["embed"].weight
    torch.testing.assert_close(model["head"](x.detach()), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(model["embed"](torch.arange(9)), rows)


def test_two_holders_and_the_last_one_gives_back():
    model = llama()
    pack_linears(model, "first")
    pack_linears(model, "second", strict=True)
    head = model.lm_head
    assert isinstance(head, PackedLinear)
    unpack_linears(model, "first")
    assert model.lm_head is head
    unpack_linears(model, "nobody")
    assert model.lm_head is head
    unpack_linears(model, "second")
    assert type(model.lm_head) is nn.Linear
    pack_linears(model, "third")
    unpack_linears(model)
    assert type(model.lm_head) is nn.Linear


def test_small_layers_stay_dense_where_packing_does_not_pay():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(600, 600))
    pack_linears(model, "test")
    assert [type(layer) for layer in model] == [nn.Linear, PackedLinear]
    pack_linears(model, "strict", strict=True)
    assert [type(layer) for layer in model] == [PackedLinear, PackedLinear]


def test_layers_that_somebody_watches_stay_dense():
    model = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    pack_linears(model, "test")
    assert type(model[0]) is nn.Linear
    with torch.no_grad():
        model(torch.randn(1, 600))
    assert seen == [1]
    with pytest.raises(UnsupportedError, match="strict numerics need every linear layer packed"):
        pack_linears(model, "strict", strict=True)


def test_weights_of_a_kind_of_their_own_are_left_alone():
    class Quantised(torch.Tensor):
        pass

    model = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600))
    model[0].weight = nn.Parameter(model[0].weight.data.as_subclass(Quantised), requires_grad=False)
    assert pack_linears(model, "test") == 1
    assert type(model[0]) is nn.Linear
    unpack_linears(model, "test")
    with pytest.raises(UnsupportedError, match="a kind of weight of its own"):
        pack_linears(model, "test", strict=True)


def test_a_layer_in_two_places_is_packed_once():
    layer = nn.Linear(600, 600)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    pack_linears(model, "test")
    assert isinstance(model["a"], PackedLinear)
    assert model["b"][0] is model["a"]
    unpack_linears(model)
    assert model["a"] is layer
    assert model["b"][0] is layer


def test_a_copy_of_a_packed_model_is_an_ordinary_one():
    model = llama(tied=True)
    before = state(model)
    pack_linears(model, "test")
    twin = copy.deepcopy(model)
    assert not any(isinstance(module, PackedLinear | PackedEmbedding) for module in twin.modules())
    assert twin.lm_head.weight is twin.get_input_embeddings().weight
    assert all(torch.equal(value, before[name]) for name, value in state(twin).items())


def test_a_packed_model_saves_as_an_ordinary_one(tmp_path):
    model = llama(tied=True)
    before = state(model)
    pack_linears(model, "test")
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in state(loaded).items())


def test_what_a_packed_model_cannot_do_is_refused():
    model = llama()
    pack_linears(model, "test")
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        model(ids())
    with pytest.raises(UnsupportedError, match=r"cannot become torch\.float64 on cpu"):
        model.double()
    with pytest.raises(UnsupportedError, match="cannot be loaded"):
        model.load_state_dict(state(model))
    assert model.to("cpu") is model


def test_generate_still_works_on_a_packed_model():
    model = llama()
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(ids(), **options)
    pack_linears(model, "test")
    assert torch.equal(model.generate(ids(), **options), wanted)


@pytest.mark.parametrize(("packed", "expected"), [("auto", PackedLinear), (True, PackedLinear), (False, nn.Linear)])
def test_an_engine_packs_while_it_lives(packed, expected):
    model = llama()
    engine = build_engine(model, "ngram", packed=packed, max_length=64)
    assert type(model.lm_head) is expected
    request = Request("a", np.arange(5, 25, dtype=np.int32), SamplingParams(max_new_tokens=6))
    new_ids = [token for output in engine.generate([request]) for token in output.new_ids]
    engine.close()
    assert type(model.lm_head) is nn.Linear
    wanted = model.generate(torch.arange(5, 25)[None], max_new_tokens=6, do_sample=False)[0, 20:].tolist()
    assert new_ids == wanted


def test_an_engine_that_cannot_be_built_leaves_the_model_as_it_was():
    model = llama()
    with pytest.raises(RuntimeError, match="no sampler"):
        build_engine(model, "none", observers=_Broken())
    assert type(model.lm_head) is nn.Linear


class _Broken:
    def __iter__(self):
        raise RuntimeError("no sampler")


def test_speculate_keeps_the_weights_packed_between_calls():
    model = llama()
    call = specdec.speculate("ngram")
    wanted = model.generate(ids(), max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids(), max_new_tokens=8, do_sample=False, custom_generate=call), wanted)
    assert isinstance(model.lm_head, PackedLinear)
    specdec.unpack_linears(model)
    assert type(model.lm_head) is nn.Linear
    unpacked = specdec.speculate("ngram", packed=False)
    assert torch.equal(model.generate(ids(), max_new_tokens=8, do_sample=False, custom_generate=unpacked), wanted)
    assert type(model.lm_head) is nn.Linear


def test_packing_by_name_says_what_is_in_the_way():
    with torch.device("meta"):
        elsewhere = nn.Sequential(nn.Linear(4, 4))
    assert "this one is on meta" in packing_obstacle(elsewhere)
    assert "float64" in packing_obstacle(nn.Sequential(nn.Linear(4, 4)).double())
    assert packing_obstacle(nn.Sequential(nn.Linear(4, 4))) is None
    with pytest.raises(ConfigError, match="packed=True is impossible here: no linear layer is in float32 or bfloat16"):
        build_engine(llama().double(), "none", packed=True, max_length=64)
    with pytest.raises(ConfigError, match="packed: Input should be 'auto', True or False, got 'sometimes'"):
        build_engine(llama(), "none", packed="sometimes")
    build_engine(llama().double(), "none", packed="auto", max_length=64).close()
