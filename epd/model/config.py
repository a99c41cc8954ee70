"""What a checkpoint's JSON files say about the model, as frozen values.

Knows the two spellings of a Qwen3 / Qwen3-VL folder, dense or with experts (as published on the hub, and as transformers 5 saves
it), and the layout of
a KV block and of an embedding row. Does not know weights, devices or torch: a gateway imports this module and must start fast.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epd.errors import BadCheckpoint, BadConfig

HOST_FORMAT = "float32 xxh3"  # of blocks in host memory
ARCHITECTURES = (
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Feed-forward layers of which each token takes the few that a router finds most probable (Shazeer et al. 2017)."""

    num_experts: int
    num_chosen: int  # of them by each token
    intermediate_size: int  # of one
    normalizes: bool  # whether the weights of those chosen are made to add up to 1
    is_packed: bool  # all experts of a layer are one tensor in the checkpoint
    layers: tuple[int, ...]  # those that have them; others have one dense feed-forward layer


@dataclass(frozen=True, slots=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int] | None  # frequencies of time, height, width; None: one position per token
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    experts: ExpertsConfig | None = None

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """None: the layer is dense."""
        return self.experts if self.experts is not None and layer in self.experts.layers else None

    @property
    def dense_size(self) -> int:
        """Intermediate size of dense layers, 0 where there are none."""
        has_any = self.experts is None or len(self.experts.layers) < self.num_layers
        return self.intermediate_size if has_any else 0


@dataclass(frozen=True, slots=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    out_hidden_size: int
    num_position_embeddings: int  # of a square table
    deepstack_layers: tuple[int, ...]  # vision layers whose output is added after text layers 0, 1, ...

    @property
    def patch_width(self) -> int:
        """Numbers in one patch: channels * frames * height * width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """How an image file becomes patches."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int  # PIL's number of the filter
    rescale_factor: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    text: TextConfig
    vision: VisionConfig | None
    image: ImageConfig | None
    eos_token_ids: tuple[int, ...]
    image_token_id: int = -1
    video_token_id: int = -1
    vision_start_token_id: int = -1
    vision_end_token_id: int = -1

    @property
    def max_position_embeddings(self) -> int:
        return self.text.max_position_embeddings

    @property
    def num_deepstack(self) -> int:
        return len(self.vision.deepstack_layers) if self.vision else 0

    @property
    def embedding_width(self) -> int:
        """Numbers in one row of an image's embedding: the main row, then one per deepstack layer."""
        return (1 + self.num_deepstack) * self.text.hidden_size

    def embedding_layout(self, block_format: str = HOST_FORMAT) -> int:
        """Fingerprint of an embedding row; two ends that agree on it can exchange embeddings. The format is the backend's."""
        return _fingerprint("embedding", block_format, self.num_deepstack, self.text.hidden_size)

    def kv_block_shape(self, block_size: int) -> tuple[int, int, int, int, int]:
        """[num_layers, 2 (key, value), num_kv_heads, block_size, head_dim], in the backend's dtype."""
        return (self.text.num_layers, 2, self.text.num_kv_heads, block_size, self.text.head_dim)

    def kv_layout(self, block_size: int, block_format: str = HOST_FORMAT) -> int:
        """Fingerprint of a KV block; two ends that agree on it can exchange blocks. The format is the backend's."""
        return _fingerprint("kv", block_format, "layer,kv,head,token,dim", *self.kv_block_shape(block_size))


def load_model_config(folder: str | Path) -> ModelConfig:
    """Read config.json, generation_config.json and the preprocessor's file of a checkpoint folder.

    Raises BadCheckpoint for files that are missing or cannot be read, BadConfig for a model that this version does not run; both
    name the file and the field.
    """
    folder = Path(folder)
    fields = _Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    architectures = fields.raw.get("architectures") or []
    if not architectures or architectures[0] not in ARCHITECTURES:
        named = ", ".join(map(str, architectures)) or "no architecture at all"
        raise BadConfig(f"{fields.where} names {named}; this version runs {', '.join(ARCHITECTURES)}")
    if fields.raw.get("quantization_config"):
        raise BadConfig(
            f"{fields.where} has a quantization_config; quantized checkpoints are not supported, use the unquantized one"
        )
    has_experts = "Moe" in architectures[0]
    if architectures[0].endswith("ForCausalLM"):
        tie = bool(fields.raw.get("tie_word_embeddings", False))
        text = _text_config(fields, tie=tie, multimodal=False, has_experts=has_experts)
        return ModelConfig(
            architecture=architectures[0], text=text, vision=None, image=None, eos_token_ids=_eos_ids(folder, fields.raw)
        )
    text_fields = fields.section("text_config")
    tie = fields.raw.get("tie_word_embeddings", text_fields.raw.get("tie_word_embeddings", False))
    text = _text_config(text_fields, tie=bool(tie), multimodal=True, has_experts=has_experts)
    vision = _vision_config(fields.section("vision_config"), text)
    return ModelConfig(
        architecture=architectures[0],
        text=text,
        vision=vision,
        image=_image_config(folder, vision),
        eos_token_ids=_eos_ids(folder, {**text_fields.raw, **fields.raw}),
        image_token_id=fields.integer("image_token_id", default=151655, least=0),
        video_token_id=fields.integer("video_token_id", default=151656, least=0),
        vision_start_token_id=fields.integer("vision_start_token_id", default=151652, least=0),
        vision_end_token_id=fields.integer("vision_end_token_id", default=151653, least=0),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; BadCheckpoint when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpoint(f"{path} does not exist; is {path.parent} the folder of a checkpoint?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} holds a JSON {type(value).__name__} where an object is expected")
    return value


class _Fields:
    """A JSON object that names itself in errors."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def section(self, name: str) -> _Fields:
        value = self.raw.get(name)
        if not isinstance(value, dict):
            raise BadConfig(f"{self.where} has no object {name!r}")
        return _Fields(value, f"{self.where}:{name}")

    def integer(self, name: str, *, default: int | None = None, least: int = 1) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, list | tuple) and value and all(item == value[0] for item in value):
            value = value[0]  # patch_size may be given per axis
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BadConfig(f"{self.where}: {name} must be an integer of {least} or more, not {value!r}")
        return value

    def number(self, name: str, *, default: float) -> float:
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise BadConfig(f"{self.where}: {name} must be a positive number, not {value!r}")
        return float(value)

    def expect(self, name: str, *allowed: Any) -> None:
        """Absent counts as the first of `allowed`."""
        value = self.raw.get(name, allowed[0])
        if value not in allowed:
            raise BadConfig(f"{self.where}: {name} = {value!r} is not supported (only {' or '.join(map(repr, allowed))})")


def _text_config(fields: _Fields, *, tie: bool, multimodal: bool, has_experts: bool) -> TextConfig:
    fields.expect("hidden_act", "silu")
    fields.expect("use_sliding_window", False, None)
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    # The configuration classes of models with experts have no default of their own.
    head_dim = fields.integer("head_dim", default=max(1, hidden_size // num_heads) if has_experts else 128)
    if num_heads % num_kv_heads:
        raise BadConfig(f"{fields.where}: {num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly")
    if head_dim % 2:
        raise BadConfig(f"{fields.where}: head_dim {head_dim} is odd, rotary embedding needs pairs")
    theta, section = _rope(fields, head_dim, multimodal=multimodal)
    return TextConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=theta,
        mrope_section=section,
        attention_bias=bool(fields.raw.get("attention_bias", False)),
        tie_word_embeddings=tie,
        max_position_embeddings=fields.integer("max_position_embeddings", default=32768),
        experts=_experts_config(fields, multimodal=multimodal) if has_experts else None,
    )


def _experts_config(fields: _Fields, *, multimodal: bool) -> ExpertsConfig:
    """transformers 5 may write `num_local_experts` for `num_experts`."""
    num_experts = fields.integer("num_local_experts" if "num_local_experts" in fields.raw else "num_experts")
    num_chosen = fields.integer("num_experts_per_tok")
    if num_chosen > num_experts:
        raise BadConfig(f"{fields.where}: a token cannot have {num_chosen} of {num_experts} experts")
    step, dense = fields.integer("decoder_sparse_step", default=1), fields.raw.get("mlp_only_layers") or []
    num_layers = fields.integer("num_hidden_layers")
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise BadConfig(f"{fields.where}: mlp_only_layers must be numbers of layers, not {dense!r}")
    if multimodal:
        fields.expect("norm_topk_prob", True, None)
    return ExpertsConfig(
        num_experts=num_experts,
        num_chosen=num_chosen,
        intermediate_size=fields.integer("moe_intermediate_size"),
        normalizes=multimodal or bool(fields.raw.get("norm_topk_prob", False)),
        is_packed=multimodal,
        layers=tuple(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense),
    )


def _rope(fields: _Fields, head_dim: int, *, multimodal: bool) -> tuple[float, tuple[int, int, int] | None]:
    """transformers 5 writes `rope_parameters`; the hub's files have `rope_theta` and, for M-RoPE, `rope_scaling`."""
    rope = {**(fields.raw.get("rope_scaling") or {}), **(fields.raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise BadConfig(f"{fields.where}: rope type {kind!r} is not supported (only 'default')")
    # The default base of the configuration classes: 500000 for Qwen3-VL, 10000 for Qwen3.
    default_theta = fields.number("rope_theta", default=500000.0 if multimodal else 10000.0)
    theta = _Fields(rope, fields.where).number("rope_theta", default=default_theta)
    if not multimodal:
        return theta, None
    if not rope.get("mrope_interleaved", True):
        raise BadConfig(f"{fields.where}: mrope_interleaved = false is not supported")
    section = rope.get("mrope_section", [24, 20, 20])
    if not (isinstance(section, list) and len(section) == 3 and all(isinstance(n, int) and n >= 0 for n in section)):
        raise BadConfig(f"{fields.where}: mrope_section must be three counts, not {section!r}")
    if 3 * max(section[1:]) > head_dim // 2 + 2:
        raise BadConfig(
            f"{fields.where}: mrope_section {section} reaches beyond the {head_dim // 2} frequencies of head_dim {head_dim}"
        )
    return theta, (section[0], section[1], section[2])


def _vision_config(fields: _Fields, text: TextConfig) -> VisionConfig:
    fields.expect("hidden_act", "gelu_pytorch_tanh")
    deepstack = fields.raw.get("deepstack_visual_indexes", [8, 16, 24])
    depth = fields.integer("depth")
    if not isinstance(deepstack, list) or any(not isinstance(i, int) or not 0 <= i < depth for i in deepstack):
        raise BadConfig(f"{fields.where}: deepstack_visual_indexes must be layers below {depth}, not {deepstack!r}")
    if len(deepstack) > text.num_layers:
        raise BadConfig(f"{fields.where}: {len(deepstack)} deepstack features for {text.num_layers} text layers")
    if list(deepstack) != sorted(set(deepstack)):
        raise BadConfig(f"{fields.where}: deepstack_visual_indexes must rise, not {deepstack!r}")
    vision = VisionConfig(
        depth=depth,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=fields.integer("num_heads"),
        in_channels=fields.integer("in_channels", default=3),
        patch_size=fields.integer("patch_size", default=16),
        temporal_patch_size=fields.integer("temporal_patch_size", default=2),
        merge_size=fields.integer("spatial_merge_size", default=2),
        out_hidden_size=fields.integer("out_hidden_size"),
        num_position_embeddings=fields.integer("num_position_embeddings"),
        deepstack_layers=tuple(deepstack),
    )
    if vision.hidden_size % (4 * vision.num_heads):
        raise BadConfig(
            f"{fields.where}: hidden_size {vision.hidden_size} does not split into {vision.num_heads} heads of a multiple of 4"
        )
    if vision.out_hidden_size != text.hidden_size:
        raise BadConfig(
            f"{fields.where}: out_hidden_size {vision.out_hidden_size} is not the text's hidden_size {text.hidden_size}"
        )
    if vision.in_channels != 3:
        raise BadConfig(f"{fields.where}: in_channels {vision.in_channels} is not supported (only 3)")
    if round(vision.num_position_embeddings**0.5) ** 2 != vision.num_position_embeddings:
        raise BadConfig(f"{fields.where}: num_position_embeddings {vision.num_position_embeddings} is not a square")
    return vision


def _image_config(folder: Path, vision: VisionConfig) -> ImageConfig:
    """From preprocessor_config.json, or processor_config.json's image_processor; without either, as Qwen3-VL is published."""
    fields = _Fields({}, str(folder / "preprocessor_config.json"))
    if (folder / "preprocessor_config.json").exists():
        fields = _Fields(read_json(folder / "preprocessor_config.json"), fields.where)
    elif (folder / "processor_config.json").exists():
        processor = _Fields(read_json(folder / "processor_config.json"), str(folder / "processor_config.json"))
        fields = processor.section("image_processor") if "image_processor" in processor.raw else fields
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        fields.expect(name, True, None)
    for name, built in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.merge_size),
    ):
        if fields.integer(name, default=built) != built:
            raise BadConfig(f"{fields.where}: {name} {fields.raw[name]} differs from the vision tower's {built}")
    size = _Fields(fields.raw.get("size") or {}, f"{fields.where}:size")
    return ImageConfig(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.merge_size,
        min_pixels=fields.integer("min_pixels", default=size.integer("shortest_edge", default=65536)),
        max_pixels=fields.integer("max_pixels", default=size.integer("longest_edge", default=16777216)),
        mean=_three(fields, "image_mean"),
        std=_three(fields, "image_std"),
        resample=fields.integer("resample", default=3, least=0),
        rescale_factor=fields.number("rescale_factor", default=1 / 255),
    )


def _three(fields: _Fields, name: str) -> tuple[float, float, float]:
    value = fields.raw.get(name) or [0.5, 0.5, 0.5]
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int | float) for v in value):
        raise BadConfig(f"{fields.where}: {name} must be three numbers, not {value!r}")
    return (float(value[0]), float(value[1]), float(value[2]))


def _eos_ids(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json knows more ends than config.json (Qwen3 stops at two tokens)."""
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    value = generation.get("eos_token_id")
    value = raw.get("eos_token_id") if value is None else value
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise BadConfig(f"{folder}: eos_token_id must be token ids, not {value!r}")
    return tuple(ids)


def _fingerprint(*parts: object) -> int:
    """63 bits, so that it fits a signed wire integer."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
