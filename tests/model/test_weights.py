"""Which tensors a role reads, to where and how; a checkpoint that does not fit is refused with the names of its tensors."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from epd.errors import BadCheckpoint, BadConfig
from epd.model.config import load_model_config
from epd.model.shapes import expert_groups, text_groups, text_shapes, vision_shapes
from epd.model.weights import Placement, Weights, load_text_weights, load_vision_weights
from tests.model.reference import Model

Tensors = dict[str, torch.Tensor]
VL = "vl-deepstack2-tied"
TEXT = "qwen3-mha-bias"
EXPERTS, VL_EXPERTS = "moe-every-other-layer", "vl-moe-4-of-16"
MAPPED, READ = Placement(), Placement("cpu", "bfloat16")  # READ takes the way to a device


@pytest.fixture
def copy_of(model_of: Callable[[str], Model], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a case's folder whose tensors went through `change`."""

    def make(name: str, change: Callable[[Tensors], Tensors] = lambda tensors: tensors) -> Path:
        source = model_of(name).folder
        folder = tmp_path / name
        shutil.copytree(source, folder)
        save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors")
        return folder

    return make


@pytest.mark.parametrize("name", [VL, TEXT, EXPERTS, VL_EXPERTS])
def test_tensors_are_those_of_the_file(name: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(name)
    expected = load_file(model.folder / "model.safetensors")
    weights = load_text_weights(model.config, model.folder)
    for tensor_name in text_shapes(model.config):
        assert torch.equal(weights.tensor(tensor_name), expected[tensor_name])
    assert weights.num_bytes == sum(expected[tensor_name].numel() * 4 for tensor_name in text_shapes(model.config))


def test_float32_is_a_view_of_the_file_and_others_are_converted(copy_of: Callable[..., Path]) -> None:
    shared = copy_of(TEXT)
    assert load_text_weights(load_model_config(shared), shared).is_shared
    halves = _converted(shared, torch.bfloat16)
    weights = load_text_weights(load_model_config(halves), halves)
    assert not weights.is_shared
    original = load_file(shared / "model.safetensors")
    for name, tensor in original.items():
        assert weights.tensor(name).dtype == torch.float32
        assert torch.equal(weights.tensor(name), tensor.to(torch.bfloat16).float())


@pytest.mark.parametrize("placement", [MAPPED, READ], ids=["mapped", "read"])
def test_packed_experts_may_be_turned(
    placement: Placement, copy_of: Callable[..., Path], model_of: Callable[[str], Model]
) -> None:
    """As published: [experts, in, out]. Here gate and up have as many outputs as inputs, and only down shows it."""
    expected, config = load_file(model_of(VL_EXPERTS).folder / "model.safetensors"), model_of(VL_EXPERTS).config
    folder = copy_of(VL_EXPERTS, _turn_experts)
    weights = load_text_weights(config, folder, placement=placement)
    assert not weights.is_shared
    packed = [name for name in text_shapes(config) if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(packed) == 2 * config.text.num_layers
    for name in text_shapes(config):
        assert torch.equal(weights.tensor(name), expected[name].to(placement.torch_dtype)), name
        assert weights.tensor(name).is_contiguous() == (placement.is_mapped or name not in packed)


def test_packed_experts_of_another_shape_are_refused(copy_of: Callable[..., Path]) -> None:
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    folder = copy_of(VL_EXPERTS, lambda tensors: tensors | {name: tensors[name][:, :, 1:].contiguous()})
    with pytest.raises(BadCheckpoint, match=r"layers\.0\.mlp\.experts\.down_proj is \[16, 32, 15\], not \[16, 32, 16\]"):
        load_text_weights(load_model_config(folder), folder)


def test_experts_of_a_layer_lie_one_below_the_other_on_a_device(model_of: Callable[[str], Model]) -> None:
    model = model_of(EXPERTS)
    experts = model.config.text.experts
    assert experts is not None
    weights = load_text_weights(model.config, model.folder, placement=READ)
    gate_up, down = (weights.joined(names) for names in expert_groups(experts, f"model.layers.{experts.layers[0]}."))
    assert gate_up is not None
    assert down is not None
    assert gate_up.shape == (experts.num_experts * 2 * experts.intermediate_size, model.config.text.hidden_size)
    third = f"model.layers.{experts.layers[0]}.mlp.experts.2."
    size = experts.intermediate_size
    assert torch.equal(gate_up[5 * size : 6 * size], weights.tensor(f"{third}up_proj.weight"))
    assert torch.equal(down[2 * 48 : 3 * 48], weights.tensor(f"{third}down_proj.weight"))


def _turn_experts(tensors: Tensors) -> Tensors:
    packed = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 3}
    return tensors | {name: tensor.transpose(1, 2).contiguous() for name, tensor in packed.items()}


def test_shards_that_a_role_does_not_need_are_not_opened(copy_of: Callable[..., Path]) -> None:
    folder = copy_of(VL)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    vision = {name: tensor for name, tensor in tensors.items() if "visual" in name}
    text = {name: tensor for name, tensor in tensors.items() if "visual" not in name}
    _shard(folder, {"vision.safetensors": vision, "text.safetensors": text})
    config = load_model_config(folder)
    (folder / "vision.safetensors").rename(folder / "elsewhere")
    load_text_weights(config, folder)
    with pytest.raises(BadCheckpoint, match=r"vision\.safetensors cannot be mapped"):
        load_vision_weights(config, folder)
    (folder / "elsewhere").rename(folder / "vision.safetensors")
    (folder / "text.safetensors").unlink()
    assert load_vision_weights(config, folder).tensor("model.visual.pos_embed.weight").shape == (64, 32)


def _drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def _replace(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop("model.layers.1.mlp.up_proj.weight"), r"missing: model\.layers\.1\.mlp\.up_proj\.weight$"),
        (_drop("lm_head.weight"), r"missing: lm_head\.weight"),
        (_replace("model.norm.weight", torch.zeros(7)), r"misshaped: model\.norm\.weight is \[7\], not \[48\]"),
        (_replace("model.layers.2.mlp.up_proj.weight", torch.zeros(2)), r"unexpected: model\.layers\.2\.mlp\.up_proj\.weight"),
        (_replace("model.norm.weight", torch.zeros(48, dtype=torch.int8)), r"model\.norm\.weight is I8"),
        (lambda tensors: {"one": torch.zeros(1)}, r"missing: .* and 25 more; unexpected: one"),
    ],
)
@pytest.mark.parametrize("placement", [MAPPED, READ], ids=["mapped", "read"])
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[Tensors], Tensors], said: str, placement: Placement, copy_of: Callable[..., Path]
) -> None:
    folder = copy_of(TEXT, change)
    with pytest.raises(BadCheckpoint, match=said):
        load_text_weights(load_model_config(folder), folder, placement=placement)


def test_the_vision_tower_is_checked_too(copy_of: Callable[..., Path]) -> None:
    folder = copy_of(VL, _drop("model.visual.merger.norm.bias"))
    config = load_model_config(folder)
    with pytest.raises(BadCheckpoint, match=r"missing: model\.visual\.merger\.norm\.bias"):
        load_vision_weights(config, folder)
    load_text_weights(config, folder)  # which does not need it


def test_a_head_beside_tied_embeddings_is_not_in_the_way(copy_of: Callable[..., Path]) -> None:
    folder = copy_of(VL, _replace("lm_head.weight", torch.zeros(97, 32)))
    load_text_weights(load_model_config(folder), folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data[:5], "no safetensors file"),
        (lambda data: b"", "cannot be mapped"),
        (lambda data: (1 << 40).to_bytes(8, "little") + data[8:], "no safetensors file"),
        (lambda data: data[:-8], "is cut off"),
        (lambda data: data[:8] + b"x" + data[9:], "broken safetensors header"),
        (lambda data: data[:200], "no safetensors file"),
    ],
)
@pytest.mark.parametrize("placement", [MAPPED, READ], ids=["mapped", "read"])
def test_a_broken_file_is_refused(
    spoil: Callable[[bytes], bytes], said: str, placement: Placement, copy_of: Callable[..., Path]
) -> None:
    folder = copy_of(TEXT)
    file = folder / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(BadCheckpoint, match=said):
        load_text_weights(load_model_config(folder), folder, placement=placement)


def test_an_index_may_not_reach_out_of_its_folder(copy_of: Callable[..., Path]) -> None:
    folder = copy_of(TEXT)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "../x.safetensors"}}))
    with pytest.raises(BadCheckpoint, match="weight_map"):
        load_text_weights(load_model_config(folder), folder)


def test_an_index_that_lies_is_found_out(copy_of: Callable[..., Path]) -> None:
    folder = copy_of(TEXT)
    tensors = load_file(folder / "model.safetensors")
    names = dict.fromkeys(tensors, "model.safetensors") | {"model.norm.weight": "other.safetensors"}
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(BadCheckpoint, match=r"other\.safetensors does not hold model\.norm\.weight"):
        load_text_weights(load_model_config(folder), folder)


def test_no_weights_at_all(copy_of: Callable[..., Path]) -> None:
    folder = copy_of(TEXT)
    (folder / "model.safetensors").unlink()
    config = load_model_config(folder)
    with pytest.raises(BadCheckpoint, match="--load-format dummy needs none"):
        load_text_weights(config, folder)
    dummy = load_text_weights(config, folder, "dummy")
    assert {name: tuple(dummy.tensor(name).shape) for name in text_shapes(config)} == text_shapes(config)


def test_dummy_weights_are_the_same_everywhere_and_differ_by_name(model_of: Callable[[str], Model]) -> None:
    config = model_of(VL).config
    assert config.vision is not None
    first, second = (load_vision_weights(config, "nowhere", "dummy") for _ in range(2))
    for name, shape in vision_shapes(config.vision).items():
        assert tuple(first.tensor(name).shape) == shape
        assert torch.equal(first.tensor(name), second.tensor(name))
    assert not torch.equal(_qkv(first, 0), _qkv(first, 1))


@pytest.mark.parametrize("name", [VL, TEXT])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_device_gets_the_same_tensors_in_its_dtype(name: str, stored: torch.dtype, copy_of: Callable[..., Path]) -> None:
    folder = _converted(copy_of(name), stored)
    config = load_model_config(folder)
    weights = load_text_weights(config, folder, placement=READ)
    expected = load_file(folder / "model.safetensors")
    assert not weights.is_shared
    for tensor_name, shape in text_shapes(config).items():
        tensor = weights.tensor(tensor_name)
        assert tensor.is_contiguous()
        assert tuple(tensor.shape) == shape
        assert torch.equal(tensor, expected[tensor_name].to(torch.bfloat16))
    assert weights.num_bytes == sum(2 * expected[tensor_name].numel() for tensor_name in text_shapes(config))


def test_what_is_used_side_by_side_was_read_that_way(model_of: Callable[[str], Model]) -> None:
    model = model_of(TEXT)
    separate = load_text_weights(model.config, model.folder)
    weights = load_text_weights(model.config, model.folder, placement=READ)
    for group in text_groups(model.config):
        before = [weights.tensor(name).data_ptr() for name in group]
        joined = weights.joined(group)
        assert joined is not None
        assert [weights.tensor(name).data_ptr() for name in group] == before
        assert joined.data_ptr() == before[0]
        assert torch.equal(joined, torch.cat([separate.tensor(name) for name in group]).to(torch.bfloat16))


def test_all_of_a_role_is_one_allocation(model_of: Callable[[str], Model]) -> None:
    weights = load_text_weights(model_of(TEXT).config, model_of(TEXT).folder, placement=READ)
    tensors = [weights.tensor(name) for name in text_shapes(model_of(TEXT).config)]
    memory = tensors[0].untyped_storage()
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == {memory.data_ptr()}
    assert memory.nbytes() < weights.num_bytes + 256 * len(tensors)
    ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


def test_dummy_weights_of_a_device_are_drawn_in_its_dtype(model_of: Callable[[str], Model]) -> None:
    config = model_of(TEXT).config
    first, second = (load_text_weights(config, "nowhere", "dummy", placement=READ) for _ in range(2))
    for name in text_shapes(config):
        assert first.tensor(name).dtype == torch.bfloat16
        assert torch.equal(first.tensor(name), second.tensor(name))
    group = text_groups(config)[0]
    joined = first.joined(group)
    assert joined is not None
    assert joined.data_ptr() == first.tensor(group[0]).data_ptr()


def test_a_device_without_room_says_what_the_weights_take(
    model_of: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(BadConfig, match=r"the weights take 0\.00 GiB: no room"):
        load_text_weights(model_of(TEXT).config, model_of(TEXT).folder, placement=READ)


def test_a_text_model_has_no_vision_weights(model_of: Callable[[str], Model]) -> None:
    model = model_of(TEXT)
    with pytest.raises(BadCheckpoint, match="no vision tower"):
        load_vision_weights(model.config, model.folder)


@pytest.mark.parametrize("placement", [MAPPED, READ], ids=["mapped", "read"])
def test_progress_counts_to_the_end(placement: Placement, model_of: Callable[[str], Model]) -> None:
    model = model_of(TEXT)
    seen: list[tuple[int, int]] = []
    load_text_weights(model.config, model.folder, progress=lambda done, total: seen.append((done, total)), placement=placement)
    count = len(text_shapes(model.config))
    assert seen == [(i + 1, count) for i in range(count)]


def _qkv(weights: Weights, layer: int) -> torch.Tensor:
    return weights.tensor(f"model.visual.blocks.{layer}.attn.qkv.weight")


def _converted(folder: Path, dtype: torch.dtype) -> Path:
    target = folder.parent / str(dtype)
    shutil.copytree(folder, target)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors")
    return target


def _shard(folder: Path, shards: dict[str, Tensors]) -> None:
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    names = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
