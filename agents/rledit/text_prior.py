"""The prior of ordinary text: least squares that know where the rest of an LLM lives.

An editor that solves ridge least squares, ΔW = argmin ‖ΔW uᵀ − vᵀ‖² + λ‖ΔW‖², pays the same for every direction. With
S_0 = λI + c·C in place of λI, C = E[k kᵀ] over the tokens of text, it pays c·E‖ΔW k‖² for what the update changes at
text's keys. It is the covariance of ROME and MEMIT (Meng et al., NeurIPS 2022, section 3.1), for every editor of the
`Hypernetwork`'s family (``prior_source="text"`` in `HypernetworkConfig`).
"""

from __future__ import annotations

from agents.key_statistics import key_statistics, output_moments
from agents.rledit.hypernetwork import Hypernetwork
from rledit_env.lm.editable import EditableLM


def start_from_text(network: Hypernetwork, lm: EditableLM, progress_bar: bool = True) -> None:
    """Give a network the second moments of text that its configuration asks for, from the cache if they are there.

    Args:
        network: its configuration names the text and how much of it.
        lm: the LLM, edited or not; it writes the text, under its pre-trained weights, and is not changed.
        progress_bar: show one where something has to be computed.

    Raises:
        FileNotFoundError: there is no such text file.
        ValueError: it has fewer than 64 tokens.
    """
    config = network.config
    statistics = key_statistics(lm, list(network.shapes), config.text, config.text_tokens, progress=progress_bar)
    network.key_memory.start_from(statistics.second_moments)


def turn_by_text(network: Hypernetwork, lm: EditableLM, progress_bar: bool = True) -> None:
    """Give a network the curvature of the outputs on the text that its configuration names, from the cache if it is
    there; arguments and errors are :func:`start_from_text`'s."""
    config = network.config
    tokens = max(64, config.text_tokens // 4)
    network.turn_by(output_moments(lm, list(network.shapes), config.text, tokens, progress=progress_bar))
