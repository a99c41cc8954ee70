"""Gets the bytes of a request's images: out of data URLs, or from hosts that the operator allows.

An image URL makes this server open a connection on a client's word, so it goes out only to a host on the list, only to public
addresses, and to the very address that was checked (a name that is looked up again may answer differently the second time). No
redirect is followed, no proxy or cookie is used, size and time are limited. Does not know image formats.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from epd.errors import BadImage
from epd.http.messages import ImageSource

MAX_DOWNLOAD_BYTES = 32 * 2**20
MAX_DOWNLOAD_S = 20.0
MAX_DOWNLOADS = 8  # at once, over all requests

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # of a host's last label: such a host is an address, says the URL standard
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Allowed = Callable[[str], bool]
"""Whether a connection may go to an address."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where IPv6 wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(ip.packed[-4:])
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False  # the old private range, which is_global does not know
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def decode_data_url(url: str) -> bytes:
    """The bytes in a `data:image/...;base64,` URL; raises BadImage. Nothing but base64 with its padding is taken."""
    match = _DATA_URL.match(url)
    if match is None:
        raise BadImage('a data URL must begin with "data:image/TYPE;base64,"')
    try:
        data = base64.b64decode(memoryview(url[match.end() :].encode("ascii")), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise BadImage(f"the data URL is not valid base64 ({error}); encode the whole file, with padding") from None
    if not data:
        raise BadImage("the data URL holds no bytes")
    return data


class ImageFetcher:
    """Resolves image sources to bytes. Close it when done."""

    def __init__(self, allow_hosts: Sequence[str], *, address_allowed: Allowed = is_public) -> None:
        """
        Args:
            allow_hosts: host names, or host:port for other ports than 80 and 443.
            address_allowed: which addresses a download may connect to.
        """
        self._allow_hosts = frozenset(host.lower() for host in allow_hosts)
        self._address_allowed = address_allowed
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(MAX_DOWNLOADS)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def fetch(self, source: ImageSource) -> bytes:
        """The image's file.

        Raises:
            BadImage: the URL is not allowed, leads nowhere or to too much; names the field of the request.
        """
        try:
            if source.url[:5].lower() == "data:":
                return decode_data_url(source.url)
            async with self._slots, asyncio.timeout(MAX_DOWNLOAD_S):
                return await self._download(source.url)
        except TimeoutError:
            raise BadImage(f"{source.param}: the image did not arrive within {MAX_DOWNLOAD_S:g} s", param=source.param) from None
        except BadImage as error:
            raise BadImage(f"{source.param}: {error.message}", param=source.param) from None

    async def _download(self, url: str) -> bytes:
        self._check(url)
        if self._session is None:
            self._session = self._open_session()
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                if 300 <= response.status < 400:
                    raise BadImage("the host answers with a redirect, and none is followed; send the final URL")
                if response.status != 200:
                    raise BadImage(f"the host answers with status {response.status}")
                return await _read(response)
        except _NotAllowed as error:
            raise BadImage(str(error)) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error.__cause__, _NotAllowed):
                raise BadImage(str(error.__cause__)) from None
            raise BadImage(f"the image cannot be downloaded ({type(error).__name__})") from None

    def _check(self, url: str) -> None:
        """Whether the URL may be asked for at all, before any name is looked up."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise BadImage("not a URL") from None
        if parts.scheme.lower() not in ("http", "https") or not host:
            raise BadImage("an image must be a data URL or an http(s) URL")
        if parts.username is not None or parts.password is not None:
            raise BadImage("an image URL must not hold a user name or password")
        usual = port is None or port == {"http": 80, "https": 443}[parts.scheme.lower()]
        if not (f"{host}:{port}" in self._allow_hosts or (usual and host in self._allow_hosts)):
            raise BadImage("this server does not fetch images from that host; send the image as a data URL")
        try:
            address = str(ipaddress.ip_address(host))
        except ValueError:
            if _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):  # what it stands for is settled where nobody checks it
                raise BadImage("an address must be written in full, as 192.0.2.1 or [2001:db8::1]") from None
            return  # a name: the resolver checks what it stands for
        if not self._address_allowed(address):
            raise BadImage("that address is not on the public internet")

    def _open_session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            resolver=_CheckingResolver(self._address_allowed), use_dns_cache=False, force_close=True, limit=MAX_DOWNLOADS
        )
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=MAX_DOWNLOAD_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a body that unpacks to more than was sent is no image file
            headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "epd"},
            trust_env=False,
        )


class _NotAllowed(OSError):
    """A name stands for an address that must not be connected to."""


class _CheckingResolver(AbstractResolver):
    """Looks a name up once; the connection goes to the addresses that it returns, so these are the checked ones."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        results: list[ResolveResult] = []
        for address_family, _, protocol, _, address in found:
            ip = str(address[0])
            if not self._allowed(ip):
                raise _NotAllowed("that host's name leads to an address that is not on the public internet")
            flags = socket.AI_NUMERICHOST
            results.append(ResolveResult(hostname=host, host=ip, port=port, family=address_family, proto=protocol, flags=flags))
        if not results:
            raise OSError(f"no address for {host}")
        return results

    async def close(self) -> None:
        """Nothing is held."""


async def _read(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > MAX_DOWNLOAD_BYTES:
            raise BadImage(f"the image has more than {MAX_DOWNLOAD_BYTES} bytes")
    return bytes(data)
