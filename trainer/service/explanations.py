"""Explanations of results, with the model and the frames of an index."""

from __future__ import annotations

from typing import Any

from tvr.trainer.explanation.explanation import Explanation, explain, explanation_page
from tvr.trainer.service.records import SearchIndex


class Explanations:
    """The service's `Explainer`."""

    def explain(self, index: SearchIndex, caption: str, video: int) -> dict[str, Any]:
        return self._found(index, caption, video).to_json()

    def page(self, index: SearchIndex, caption: str, video: int, title: str) -> str:
        return explanation_page(
            self._found(index, caption, video), index.frames(video), title=title
        )

    def _found(self, index: SearchIndex, caption: str, video: int) -> Explanation:
        times = index.features.frame_times(video)
        return explain(index.model, caption, index.frames(video), frame_times=times)
