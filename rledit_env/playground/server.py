"""Serves the page to this computer's browsers, and to nobody else."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rledit_env.playground.sessions import Sessions
from rledit_env.playground.tables import CSS

HOST = "127.0.0.1"
FONTS = ["system-ui", "Segoe UI", "Helvetica Neue", "sans-serif"]  # those of the computer; none is fetched
MONOSPACED = ["ui-monospace", "Consolas", "monospace"]


class Server:
    """The running page.

    Attributes:
        address: its address.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def wait(self) -> None:
        """Wait for Ctrl-C."""
        threading.Event().wait()


@contextmanager
def serve(sessions: Sessions, model: str, editor: str, port: int = 0) -> Iterator[Server]:
    """Context in which the page is served; at its end all sessions are freed.

    Args:
        sessions: the sessions of its tabs.
        model, editor: what the page proposes.
        port: the port; 0 takes a free one.

    Raises:
        OSError: the port is in use.
    """
    port = _free_port(port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported
    import gradio as gr

    from rledit_env.playground.page import playground

    page = playground(sessions, model, editor)
    theme = gr.themes.Default(font=FONTS, font_mono=MONOSPACED)
    try:
        page.launch(
            server_name=HOST, server_port=port, share=False, prevent_thread_lock=True, quiet=True, inbrowser=False,
            ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, footer_links=[], theme=theme,
            head=f"<style>{CSS}</style>",  # `css` would only reach what is within the page's blocks
        )  # fmt: skip
        yield Server(f"http://{HOST}:{port}")
    finally:
        sessions.close_all()
        page.close(verbose=False)


def _free_port(port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        OSError: the port is in use, or needs rights that the user has not.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise OSError(f"port {port} cannot be taken ({error.strerror}); give another --port, or 0 for any free "
                          "one") from error
        return int(probe.getsockname()[1])
