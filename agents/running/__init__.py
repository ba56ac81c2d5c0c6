"""Runs agents: editing, recording, comparing, choosing modules and strengths, and the registry of editors."""

from agents.running.editing import EditLog, edit_facts, edit_stream
from agents.running.saved import agent_settings, find_agent, load_agent

__all__ = [
    "EditLog",
    "agent_settings",
    "edit_facts",
    "edit_stream",
    "find_agent",
    "load_agent",
]
