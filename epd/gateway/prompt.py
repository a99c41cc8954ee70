"""A client's words and images become the token ids that the stages work on.

Only the chat template and the server itself may write special tokens. Where a client's text spells one out ("<|im_end|>",
"<|image_pad|>"), it is neutralised: it reaches the model letter by letter, as the plain text it is. For that, the text is
broken by a random mark before the template sees it; the rendered prompt is then cut at the special tokens that are still whole,
the marks are taken out, and the pieces in between are encoded as plain text. /v1/completions takes a raw prompt, whose author
writes the special tokens himself; only placeholders are refused there, since no image could stand behind them.

Knows the tokenizer, the template, how many tokens an image takes. Does not know workers, HTTP, or how an image is decoded.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from epd.errors import BadImage, BadRequest, PromptTooLong, Unsupported
from epd.gateway.speech import Thinking
from epd.gateway.template import ChatTemplate
from epd.model.config import ModelConfig
from epd.model.preprocess import MAX_IMAGE_PIXELS, image_grid
from epd.request import PromptImage
from epd.tokenizer import Tokenizer
from protocol.messages import MMItem

# NFC may shorten a text (a letter and its accent become one character), so a bound on its tokens from its bytes needs some room.
_NFC_SHRINK = 4


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with the placeholders expanded, and the images behind them."""

    token_ids: tuple[int, ...]
    images: tuple[PromptImage, ...] = ()
    thinking: Thinking = Thinking.NONE  # what it says of thoughts before the answer


class Prompter:
    """Builds prompts for one model. Holds nothing of a request; threads may share it."""

    def __init__(
        self, *, tokenizer: Tokenizer, template: ChatTemplate | None, config: ModelConfig, max_model_len: Callable[[], int]
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.config = config
        self._max_model_len = max_model_len
        # What an image's embedding depends on besides its bytes; a key keeps apart what differs in it.
        self._image_key = hashlib.blake2b(repr(config.image).encode(), digest_size=32).digest()
        self._neutral = _Neutraliser(tokenizer)
        self._max_token_bytes = tokenizer.max_token_bytes

    @classmethod
    def from_folder(cls, folder: str | Path, config: ModelConfig, *, max_model_len: Callable[[], int]) -> Prompter:
        """Read tokenizer and chat template of a checkpoint folder.

        Args:
            max_model_len: most tokens that prompt and output may have together; asked each time, since it depends on the workers.

        Raises:
            BadCheckpoint: the tokenizer is missing or not supported, or the template is broken.
        """
        tokenizer, template = Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder)
        return cls(tokenizer=tokenizer, template=template, config=config, max_model_len=max_model_len)

    @property
    def max_model_len(self) -> int:
        return self._max_model_len()

    @property
    def takes_images(self) -> bool:
        return self.config.image is not None

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        images: Sequence[bytes] = (),
        options: Mapping[str, object] | None = None,
        tools: Sequence[Mapping[str, object]] = (),
        *,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> Prompt:
        """The prompt for the assistant's next turn.

        Args:
            messages: `role` and `content`: a text, or parts `{"type": "text", "text": ...}` and `{"type": "image"}`; what else
                they have is the template's to know.
            images: the files of the image parts, in their order.
            options: variables of the template, such as `enable_thinking`.
            tools: functions that the model may call, as OpenAI's API describes them.
            max_image_pixels: of an image as it was sent.

        Raises:
            BadRequest: no template, or it refuses the messages; BadImage: an image that cannot be read; PromptTooLong.
        """
        if self.template is None:
            raise Unsupported("this model has no chat template; use /v1/completions", param="messages")
        unknown = sorted(set(options or {}) - self.template.options)
        if unknown:
            raise Unsupported(f"this model's chat template has no option {unknown[0]!r}", param="chat_template_kwargs")
        if images and not self.takes_images:
            raise Unsupported("this model takes no images", param="messages")
        has_calls = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if (tools or has_calls) and not self.template.has_tools:
            raise Unsupported(
                "this model's chat template has no tools, or writes calls in a way that is not supported",
                param="tools" if tools else "messages",
            )
        self._check_size(_num_chars(messages) + _num_chars(tools), param="messages")
        items = [self._item(data, f"image {index} of {len(images)}", max_image_pixels) for index, data in enumerate(images, 1)]
        mark = "\ue000" + secrets.token_hex(8) + "\ue001"
        safe = [self._neutral.message(message, mark, flat=not self.takes_images) for message in messages]
        rendered = self.template.render(safe, options, [self._neutral.fields(tool, mark) for tool in tools])
        prompt = self._with_images(self._neutral.encode(rendered, mark), items, images)
        return replace(prompt, thinking=self.template.thinking_after(rendered))

    def completion(self, prompt: str | Sequence[int]) -> Prompt:
        """The prompt of a raw completion: a text that may spell out special tokens, or token ids.

        Raises:
            BadRequest: it is empty, has ids that the model does not have, or placeholders; PromptTooLong.
        """
        if isinstance(prompt, str):
            self._check_size(len(prompt), param="prompt")
            token_ids = self.tokenizer.encode_raw(prompt)
        else:
            token_ids = list(prompt)
            vocab_size = self.config.text.vocab_size
            if (bad := next((token for token in token_ids if not 0 <= token < vocab_size), None)) is not None:
                raise BadRequest(f"prompt holds the token id {bad}; the model has 0 to {vocab_size - 1}", param="prompt")
        if not token_ids:
            raise BadRequest("prompt must hold at least one token", param="prompt")
        placeholders = {self.config.image_token_id, self.config.video_token_id} - {-1}
        if not placeholders.isdisjoint(token_ids):
            raise BadRequest("prompt holds a placeholder token; images go to /v1/chat/completions", param="prompt")
        return self._checked(Prompt(tuple(token_ids)), param="prompt")

    def max_tokens(self, prompt: Prompt, wanted: int | None, *, param: str = "max_tokens") -> int:
        """How many tokens the output may have: as many as wanted, else all that fit.

        Raises:
            PromptTooLong: prompt and wanted output do not fit together.
        """
        room = self.max_model_len - len(prompt.token_ids)
        if wanted is None:
            return room
        if wanted > room:
            raise PromptTooLong(
                f"the prompt has {len(prompt.token_ids)} tokens{_image_share(prompt)} and {param} is {wanted}, together "
                f"{len(prompt.token_ids) + wanted}; the model takes {self.max_model_len} in total",
                param=param,
            )
        return wanted

    # --- images -----------------------------------------------------------------------------------------------------

    def _item(self, data: bytes, name: str, max_image_pixels: int) -> MMItem:
        assert self.config.image is not None
        try:
            t, h, w = image_grid(data, self.config.image, max_image_pixels=max_image_pixels)
        except BadImage as error:
            raise BadImage(f"{name}: {error.message}", param="messages") from error
        # A cryptographic hash: with a weaker one a client could make an image that another client's image is taken for.
        mm_hash = hashlib.blake2b(data, digest_size=16, key=self._image_key).hexdigest()
        num_tokens = t * h * w // self.config.image.merge_size**2
        return MMItem(mm_hash=mm_hash, offset=0, num_tokens=num_tokens, grid_t=t, grid_h=h, grid_w=w)

    def _with_images(self, token_ids: list[int], items: Sequence[MMItem], images: Sequence[bytes]) -> Prompt:
        """Each placeholder becomes as many as its image has tokens."""
        placeholder = self.config.image_token_id if self.takes_images else -1
        num_places = token_ids.count(placeholder)
        if num_places != len(items):
            raise BadRequest(
                f"the model's chat template has a place for {num_places} of the {len(items)} images; put them into user messages",
                param="messages",
            )
        expanded: list[int] = []
        placed: list[PromptImage] = []
        start = 0
        for item, data in zip(items, images, strict=True):
            end = token_ids.index(placeholder, start)
            expanded += token_ids[start:end]
            moved = MMItem(item.mm_hash, len(expanded), item.num_tokens, item.grid_t, item.grid_h, item.grid_w)
            placed.append(PromptImage(moved, data))
            expanded += [placeholder] * item.num_tokens
            start = end + 1
        expanded += token_ids[start:]
        return self._checked(Prompt(tuple(expanded), tuple(placed)), param="messages")

    # --- lengths ----------------------------------------------------------------------------------------------------

    def _check_size(self, num_chars: int, *, param: str) -> None:
        """Refuse before tokenizing what cannot possibly fit."""
        least = num_chars // (self._max_token_bytes * _NFC_SHRINK)
        if least >= self.max_model_len:
            raise PromptTooLong(
                f"the prompt has {num_chars} characters, so {least} tokens or more; the model takes {self.max_model_len}, "
                "prompt and output together",
                param=param,
            )

    def _checked(self, prompt: Prompt, *, param: str) -> Prompt:
        if len(prompt.token_ids) >= self.max_model_len:
            raise PromptTooLong(
                f"the prompt has {len(prompt.token_ids)} tokens{_image_share(prompt)}; the model takes {self.max_model_len}, "
                "prompt and output together",
                param=param,
            )
        return prompt


class _Neutraliser:
    """Keeps a client's text from becoming special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pattern = tokenizer.special_pattern
        names = sorted(tokenizer.special_ids)
        # Two texts side by side (or a text beside the template's own) could make a token that neither has.
        self._heads = tuple(sorted({name[cut:] for name in names for cut in range(1, len(name))}))
        self._tails = tuple(sorted({name[:cut] for name in names for cut in range(1, len(name))}))

    def message(self, message: Mapping[str, object], mark: str, *, flat: bool) -> dict[str, object]:
        """The message with its texts broken by `mark` where needed; parts joined to one text if `flat`."""
        safe = self.fields(message, mark)
        content = safe["content"]
        if flat and isinstance(content, list):
            return {**safe, "content": "".join(part["text"] for part in content)}
        return safe

    def fields(self, value: Mapping[str, object], mark: str) -> dict[str, object]:
        """A JSON object with all texts in it broken where needed, however deep."""
        return {self.text(name, mark): self._value(item, mark) for name, item in value.items()}

    def _value(self, value: object, mark: str) -> object:
        match value:
            case str():
                return self.text(value, mark)
            case Mapping():
                return self.fields(value, mark)
            case list() | tuple():
                return [self._value(item, mark) for item in value]
        return value

    def text(self, text: str, mark: str) -> str:
        if self._pattern is None:
            return text
        while self._pattern.search(text):  # again, because two occurrences may share letters
            text = self._pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        # Templates trim, so the edges that count are those of the words. No special token begins or ends with a blank.
        words = text.strip()
        if words.startswith(self._heads):
            lead = len(text) - len(text.lstrip())
            text = text[:lead] + mark + text[lead:]
        if words.endswith(self._tails):
            end = len(text.rstrip())
            text = text[:end] + mark + text[end:]
        return text

    def encode(self, rendered: str, mark: str) -> list[int]:
        """Token ids of a rendered prompt, in which special tokens that are whole were written by the template."""
        if self._pattern is None:
            return self._tokenizer.encode(rendered)
        token_ids: list[int] = []
        start = 0
        for match in self._pattern.finditer(rendered):
            if match.start() > start:
                token_ids += self._tokenizer.encode(rendered[start : match.start()].replace(mark, ""))
            token_ids.append(self._tokenizer.special_ids[match[0]])
            start = match.end()
        if start < len(rendered):
            token_ids += self._tokenizer.encode(rendered[start:].replace(mark, ""))
        return token_ids


def _num_chars(value: object) -> int:
    """Of all texts in a JSON value, but for what might not be in the prompt: fields' names, roles and types."""
    match value:
        case str():
            return len(value)
        case Mapping():
            return sum(_num_chars(item) for name, item in value.items() if name not in ("role", "type"))
        case list() | tuple():
            return sum(map(_num_chars, value))
    return 0


def _image_share(prompt: Prompt) -> str:
    if not prompt.images:
        return ""
    num_tokens = sum(image.item.num_tokens for image in prompt.images)
    return f" ({num_tokens} of them for {len(prompt.images)} image{'s' if len(prompt.images) > 1 else ''})"
