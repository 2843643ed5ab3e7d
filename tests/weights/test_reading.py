"""Every format read: the logits are the writer's own, and what cannot be read is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel, empty_model
from gptpl.weights.formats import open_model
from gptpl.weights.transfer import load_tensors

# ------------------------------------------------------------------------------- the writer's own logits


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_the_books_state_dict(book, qkv_bias, with_optimizer, config, read, logits):
    theirs = book(qkv_bias=qkv_bias, with_optimizer=with_optimizer)
    net = read(theirs.path, config(qkv_bias=qkv_bias, tie_weights=False))
    torch.testing.assert_close(logits(net, theirs.tokens), theirs.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_nanogpts_checkpoint(nano, bias, compiled, config, read, logits):
    theirs = nano(bias=bias, compiled=compiled)
    net = read(theirs.path)
    assert net.config == config(qkv_bias=bias, drop_rate=0.0)
    torch.testing.assert_close(logits(net, theirs.tokens), theirs.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpts_checkpoint_with_masks(nano, config, read, logits, bias):
    """As it is saved where nanoGPT runs without flash attention."""
    theirs = nano(bias=bias)
    checkpoint = torch.load(theirs.path, weights_only=True)
    mask = torch.ones(24, 24).tril()[None, None]
    checkpoint["model"] |= {f"transformer.h.{i}.attn.bias": mask for i in range(3)}
    torch.save(checkpoint, theirs.path)
    torch.testing.assert_close(logits(read(theirs.path), theirs.tokens), theirs.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_faces_folder(hugging_face, tied, config, read, logits):
    theirs = hugging_face(tied=tied)
    net = read(theirs.path)
    assert net.config == config(tie_weights=tied)
    torch.testing.assert_close(logits(net, theirs.tokens), theirs.logits, atol=1e-5, rtol=0)


def test_the_dropout_rate_is_the_residual_one(hugging_face, nano, read):
    assert read(hugging_face(resid_pdrop=0.25, attn_pdrop=0.5).path).config.drop_rate == 0.25
    assert read(nano().path).config.drop_rate == 0.0


def test_openais_variables_in_bf16(openai, read):
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is installed on Linux x86-64 only")
    folder = openai().path
    reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
    names = list(reader.get_variable_to_shape_map())
    tf.raw_ops.SaveV2(
        prefix=str(folder / "model.ckpt"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.cast(reader.get_tensor(name), tf.bfloat16) for name in names],
    )
    wanted = torch.from_numpy(reader.get_tensor("model/h1/mlp/c_fc/w")).bfloat16()[0].T
    assert torch.equal(read(folder).get_parameter("blocks.1.ff.up_proj.weight"), wanted.float())


def test_hugging_faces_shards(hugging_face, read, logits):
    theirs = hugging_face(shard="40KB")
    assert len(list(theirs.path.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(logits(read(theirs.path), theirs.tokens), theirs.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_bf16_in_the_file_or_in_the_model(hugging_face, stored, read, logits):
    """One rounding of the weights: within 1e-2 of the fp32 model's largest logit."""
    full = hugging_face()
    theirs = hugging_face(dtype=stored)
    ours = read(theirs.path, dtype=torch.bfloat16)
    assert ours.tok_emb.weight.dtype == torch.bfloat16
    assert ours.out_head.weight is ours.tok_emb.weight
    largest = full.logits.abs().max().item()
    torch.testing.assert_close(logits(ours, full.tokens), full.logits, atol=1e-2 * largest, rtol=0)
    if stored == torch.bfloat16:  # widened, every bit stays
        wide = read(theirs.path)
        assert all(
            torch.equal(a, b.float()) for a, b in zip(wide.parameters(), ours.parameters(), strict=True)
        )


def test_openais_tensorflow_checkpoint(openai, config, read, logits):
    theirs = openai()
    net = read(theirs.path)
    assert net.config == config()
    torch.testing.assert_close(logits(net, theirs.tokens), theirs.logits, atol=1e-5, rtol=0)


def test_a_state_dict_of_hugging_faces_class(hugging_face, tmp_path, config, read, logits):
    """As `torch.save(model.state_dict())` and older pytorch_model.bin files have it."""
    from safetensors.torch import load_file

    theirs = hugging_face()
    tensors = load_file(theirs.path / "model.safetensors")
    for name, content in (("with.bin", tensors), ("without.bin", _bare(tensors))):
        torch.save(content, tmp_path / name)
        net = read(tmp_path / name, config())
        torch.testing.assert_close(logits(net, theirs.tokens), theirs.logits, atol=1e-5, rtol=0)


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in OpenAI's own files on the hub: no prefix, and the buffers of old versions of transformers."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    blocks, context = range(3), bare["wpe.weight"].shape[0]
    mask = torch.ones(context, context).tril()[None, None]
    bare |= {f"h.{i}.attn.bias": mask.clone() for i in blocks}
    return bare | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in blocks}


def test_a_folder_as_on_the_hub(hugging_face, read, logits):
    from safetensors.torch import load_file, save_file

    theirs = hugging_face()
    file = theirs.path / "model.safetensors"
    tensors = _bare(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    torch.testing.assert_close(logits(read(theirs.path), theirs.tokens), theirs.logits, atol=1e-5, rtol=0)


def test_a_folder_from_before_safetensors(hugging_face, read, logits):
    from safetensors.torch import load_file

    theirs = hugging_face()
    torch.save(load_file(theirs.path / "model.safetensors"), theirs.path / "pytorch_model.bin")
    (theirs.path / "model.safetensors").unlink()
    torch.testing.assert_close(logits(read(theirs.path), theirs.tokens), theirs.logits, atol=1e-5, rtol=0)


def test_a_state_dict_of_our_own(tmp_path, tokens, config, read, logits):
    for tied in (True, False):
        torch.manual_seed(1)
        net = GPTModel(config(tie_weights=tied)).eval()
        torch.save(net.state_dict(), tmp_path / "ours.pth")
        again = read(tmp_path / "ours.pth", net.config)
        assert torch.equal(logits(again, tokens), logits(net, tokens))


# ------------------------------------------------------------------------------------------- asked for less


def test_a_shorter_context_only_when_asked_for(hugging_face, config, read, logits):
    theirs = hugging_face()
    with pytest.raises(InputError, match=r"set model\.context_length=24, or init\.crop_context=true"):
        read(theirs.path, config(context_length=20))
    net = read(theirs.path, config(context_length=20), crop={"context_length"})
    torch.testing.assert_close(logits(net, theirs.tokens), theirs.logits, atol=1e-5, rtol=0)


def test_a_longer_context_is_never_made_up(hugging_face, config, read):
    theirs = hugging_face()
    with pytest.raises(
        InputError, match=r"as \(24, 32\), the model wants \(40, 32\): set model\.context_length=24$"
    ):
        read(theirs.path, config(context_length=40), crop={"context_length"})


def test_a_padded_vocabulary_is_kept_or_cut_when_asked_for(nano, config, read, logits):
    theirs = nano(vocab=64)
    assert read(theirs.path).config.vocab_size == 64
    with pytest.raises(InputError, match=r"set model\.vocab_size=64, or init\.crop_vocabulary=true"):
        read(theirs.path, config(drop_rate=0.0))
    net = read(theirs.path, config(drop_rate=0.0), crop={"vocab_size"})
    torch.testing.assert_close(logits(net, theirs.tokens), theirs.logits[..., :61], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ refused


def changed(book: Callable[..., Any], change: Callable[[dict[str, Any]], Any], **shape: Any) -> Path:
    """The book's file with something done to its tensors."""
    theirs = book(**shape)
    tensors = torch.load(theirs.path, weights_only=True)
    change(tensors)
    torch.save(tensors, theirs.path)
    return Path(theirs.path)


@pytest.fixture
def refusal(config: Callable[..., GPTConfig]) -> Callable[..., str]:
    """`refusal(path)`: why the book's model cannot be filled from it; `refusal(path, tie_weights=True)`."""

    def said(path: Path, **changes: Any) -> str:
        shape = {"qkv_bias": False, "tie_weights": False} | changes
        files = open_model(path)
        with pytest.raises(InputError) as refused:
            load_tensors(empty_model(config(**shape)), files.tensors, files.table)
        return str(refused.value)

    return said


QUERY = "trf_blocks.1.att.W_query.weight"


def test_a_missing_tensor(book, refusal):
    path = changed(book, lambda tensors: tensors.pop(QUERY))
    assert f"lacks '{QUERY}', which the model needs" in refusal(path)


def test_an_extra_tensor(book, refusal):
    path = changed(book, lambda tensors: tensors.update(surplus=torch.zeros(2)))
    assert "holds 'surplus', which the model has no place for" in refusal(path)


def test_another_number_of_blocks_names_the_tensors(book, refusal):
    said = refusal(book(layers=4).path)
    assert "holds 'trf_blocks.3.att.W_key.weight'" in said
    assert "more tensors, which the model has no place for" in said


def test_a_transposed_tensor(book, refusal):
    name = "trf_blocks.0.ff.layers.0.weight"
    path = changed(book, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    assert f"{name!r} as (32, 128), the model wants (128, 32): it is transposed" in refusal(path)


def test_a_truncated_tensor(book, refusal):
    path = changed(book, lambda tensors: tensors.update({QUERY: tensors[QUERY][:-1].clone()}))
    assert f"{QUERY!r} as (31, 32), the model wants (32, 32)" in refusal(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none(book, bad, refusal):
    path = changed(book, lambda tensors: tensors[QUERY].__setitem__((3, 4), bad))
    assert f"holds {QUERY!r} with NaN or infinite numbers" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_a_type_that_weights_do_not_have(book, dtype, refusal):
    path = changed(book, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(dtype)}))
    said = refusal(path)
    assert f"holds {QUERY!r} as {str(dtype).removeprefix('torch.')}" in said


def test_what_is_no_tensor(book):
    path = changed(book, lambda tensors: tensors.__setitem__("note", "hello"))
    with pytest.raises(InputError, match="holds 'note', which is not a tensor"):
        open_model(path)


@pytest.mark.parametrize("shape", [(24, 24), (), (3,), (2, 24, 24), (2, 2, 2), (24, 12)])
def test_a_mask_that_is_not_causal(book, refusal, shape):
    name = "trf_blocks.2.att.mask"
    path = changed(book, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    assert f"{name!r}, which is not a causal mask" in refusal(path)


def test_an_untied_head_does_not_go_into_a_tied_model(book, refusal):
    said = refusal(book().path, tie_weights=True)
    assert "holds a head of its own in 'out_head.weight'" in said
    assert said.endswith("set model.tie_weights=false")


def test_a_head_that_is_the_token_embedding_goes_into_a_tied_model(book, config, read):
    path = changed(book, lambda tensors: tensors.update({"out_head.weight": tensors["tok_emb.weight"]}))
    assert read(path, config(qkv_bias=False, tie_weights=True)).config.tie_weights


def test_a_missing_head_does_not_fill_an_untied_model(hugging_face, refusal):
    said = refusal(hugging_face().path, qkv_bias=True)
    assert "lacks 'lm_head.weight'" in said
    assert said.endswith("set model.tie_weights=true")


def test_a_bias_of_query_key_and_value_is_dropped_only_if_it_is_zero(hugging_face, config, read, refusal):
    from safetensors.torch import load_file, save_file

    theirs = hugging_face()
    said = refusal(theirs.path, tie_weights=True)
    assert "holds 'transformer.h.0.attn.c_attn.bias'" in said
    assert said.endswith("set model.qkv_bias=true")
    file = theirs.path / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t * (not n.endswith("c_attn.bias")) for n, t in tensors.items()}, file)
    assert not read(theirs.path, config(qkv_bias=False)).config.qkv_bias


def test_a_model_with_the_bias_needs_it(book, refusal):
    said = refusal(book().path, qkv_bias=True)
    assert "lacks 'trf_blocks.0.att.W_key.bias'" in said
    assert said.endswith("set model.qkv_bias=false")


def test_nothing_is_written_when_a_name_or_shape_is_wrong(book, config):
    path = changed(book, lambda tensors: tensors.update({QUERY: tensors[QUERY][:-1].clone()}))
    net = empty_model(config(qkv_bias=False, tie_weights=False))
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 7)
    files = open_model(path)
    with pytest.raises(InputError):
        load_tensors(net, files.tensors, files.table)
    assert all((parameter == 7).all() for parameter in net.parameters())
