"""Tells a person's input from a viewer's own chatter in what a VNC client sends.

An open live view asks for the next picture all the time and answers the server's fences, touched or not. Only keys,
pointer and clipboard mean that somebody is there. The reader follows the message borders of the RFB protocol (version
3.8 without a password, the only kind our server offers); a message that it doesn't know makes it count every byte from
there on: rather a browser that seems busy than one put to sleep in somebody's hands.
"""

from __future__ import annotations

_VERSION_BYTES = 12
_SECURITY_BYTES = 1
_CLIENT_INIT_BYTES = 1
_GREETING_BYTES = _VERSION_BYTES + _SECURITY_BYTES + _CLIENT_INIT_BYTES

_KEY, _POINTER, _CUT_TEXT, _QEMU = 4, 5, 6, 255
_FIXED_BYTES = {
    0: 20,  # SetPixelFormat
    3: 10,  # FramebufferUpdateRequest
    _KEY: 8,
    _POINTER: 6,
    150: 10,  # EnableContinuousUpdates
    250: 4,  # xvp
    _QEMU: 12,  # extended key event
}
_INPUT = frozenset({_KEY, _POINTER, _QEMU})
_CLIPBOARD_NOTIFY_OR_PROVIDE = (1 << 27) | (1 << 28)


class InputReader:
    """Reads one client's stream, in whatever pieces it comes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = _GREETING_BYTES
        self._lost = False

    def feed(self, data: bytes) -> bool:
        """Take the next bytes; say whether they have a person's input in them."""
        if self._lost:
            return bool(data)
        self._buffer += data
        seen = False
        while self._buffer:
            if self._skip:
                taken = min(self._skip, len(self._buffer))
                del self._buffer[:taken]
                self._skip -= taken
                continue
            size = self._message_bytes()
            if size is None:
                break
            if size == 0:
                self._lost = True
                self._buffer.clear()
                return True
            seen = seen or self._is_input()
            self._skip = size
        return seen

    def _message_bytes(self) -> int | None:
        """Return the size of the message at the front; None = its length isn't here yet, 0 = it is unknown."""
        kind = self._buffer[0]
        if kind in _FIXED_BYTES:
            return _FIXED_BYTES[kind]
        if kind == 2:  # SetEncodings
            return None if len(self._buffer) < 4 else 4 + 4 * self._number(2, 2)
        if kind == 248:  # ClientFence
            return None if len(self._buffer) < 9 else 9 + self._buffer[8]
        if kind == 251:  # SetDesktopSize
            return None if len(self._buffer) < 7 else 8 + 16 * self._buffer[6]
        if kind == _CUT_TEXT:
            # A negative length is the extended clipboard: its first four bytes are flags, wanted by _is_input.
            return None if len(self._buffer) < 12 and self._wants_flags() else 8 + abs(self._cut_text_length())
        return 0

    def _wants_flags(self) -> bool:
        return len(self._buffer) < 8 or self._cut_text_length() < 0

    def _is_input(self) -> bool:
        kind = self._buffer[0]
        if kind != _CUT_TEXT:
            return kind in _INPUT
        return self._cut_text_length() >= 0 or bool(self._number(8, 4) & _CLIPBOARD_NOTIFY_OR_PROVIDE)

    def _cut_text_length(self) -> int:
        return int.from_bytes(self._buffer[4:8], "big", signed=True)

    def _number(self, at: int, n_bytes: int) -> int:
        return int.from_bytes(self._buffer[at : at + n_bytes], "big")
