"""The prior of ordinary text: least squares that protect the rest of an LLM.

Ridge least squares, ΔW = argmin ‖ΔW uᵀ − vᵀ‖² + λ‖ΔW‖², penalise every direction alike. With S_0 = λI + c·C in place of
λI, C = E[k kᵀ] over the tokens of text, they penalise the change at text's keys by c·E‖ΔW k‖². C is the covariance of
ROME and MEMIT (Meng et al., NeurIPS 2022, section 3.1), here for every `Hypernetwork` (``prior_source="text"`` in
`HypernetworkConfig`).
"""

from __future__ import annotations

from agents.key_statistics import key_statistics, output_moments
from agents.rledit.hypernetwork import Hypernetwork
from rledit_env.lm.editable import EditableLM


def start_from_text(network: Hypernetwork, lm: EditableLM, progress_bar: bool = True) -> None:
    """Give a network the second moments of text's keys, from the cache if they are there.

    Args:
        network: the network; its configuration names the text and the number of tokens.
        lm: the LLM, edited or not; its pre-trained weights write the text. It is not changed.
        progress_bar: show a progress bar while computing.

    Raises:
        FileNotFoundError: the text file does not exist.
        ValueError: the text has fewer than 64 tokens.
    """
    config = network.config
    statistics = key_statistics(lm, list(network.shapes), config.text, config.text_tokens, progress=progress_bar)
    network.key_memory.start_from(statistics.second_moments)


def turn_by_text(network: Hypernetwork, lm: EditableLM, progress_bar: bool = True) -> None:
    """Give a network the curvature of the outputs on its configuration's text, from the cache if it is there.

    Arguments and errors are those of :func:`start_from_text`.
    """
    config = network.config
    tokens = max(64, config.text_tokens // 4)
    network.turn_by(output_moments(lm, list(network.shapes), config.text, tokens, progress=progress_bar))
