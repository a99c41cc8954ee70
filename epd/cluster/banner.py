"""What a person sees when the cluster is ready: where it is, and two ways to ask it something."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw

from epd.config import ServeConfig

_IMAGE_AND_TEXT = """[
    {{"type": "image_url", "image_url": {{"url": "{image}"}}}},
    {{"type": "text", "text": "What is in this image?"}}]"""


def banner(urls: Sequence[str], config: ServeConfig, *, takes_images: bool) -> str:
    """`urls` are the bases of the endpoints, such as http://127.0.0.1:8000; `takes_images`: the model does."""
    url, *others = urls
    also = f" and at {', '.join(others)}" if others else ""
    key = f" -H 'Authorization: Bearer {config.http.api_key}'" if config.http.api_key else ""
    content = _IMAGE_AND_TEXT.format(image=example_image()) if takes_images else '"Count from 7 to 40."'
    return f"""
epd is ready at {url}{also}  (chat at /v1/chat/completions, health at /ready, workers at /v1/cluster). Ctrl-C stops it.

With curl:

curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{{
  "model": "{config.model_name}", "stream": true, "temperature": 0, "messages": [{{"role": "user", "content": {content}}}]}}'

With the openai client (pip install openai):

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{config.http.api_key or "none"}")
for chunk in client.chat.completions.create(model="{config.model_name}", stream=True, temperature=0,
        messages=[{{"role": "user", "content": "Count from 7 to 40."}}]):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
"""


def example_image() -> str:
    """A red disc at the top left and a blue square at the bottom right, 64 x 64, as a PNG data URL short enough to paste."""
    picture = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((5, 5, 27, 27), fill=(220, 40, 40))
    draw.rectangle((37, 37, 58, 58), fill=(40, 80, 220))
    data = io.BytesIO()
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=4).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
