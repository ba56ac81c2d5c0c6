"""The page of `rledit playground`: edit facts into a model in the browser, look at what changed, undo, ask, save.

`session` holds one tab's model with its edits and needs no browser; `page` shows it, with Gradio, which only `server`
and `page` import.
"""
