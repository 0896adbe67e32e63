"""The one error of this package."""

from __future__ import annotations


class WeightError(ValueError):
    """Weights that cannot be had as asked: says what is wrong, in which file, part and tensor, and what to do.

    >>> print(WeightError("the file ends at byte 12", file="a.safetensors", part="end", remedy="Download it again."))
    the file ends at byte 12 (file a.safetensors, part end). Download it again.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: object = None,
        part: str | None = None,
        tensor: str | None = None,
        remedy: str = "",
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.file = None if file is None else str(file)
        self.part = part
        self.tensor = tensor
        self.remedy = remedy

    def __str__(self) -> str:
        places = {"file": self.file, "part": self.part, "tensor": self.tensor}
        where = ", ".join(f"{kind} {place}" for kind, place in places.items() if place is not None)
        message = f"{self.problem} ({where})" if where else self.problem
        return f"{message}. {self.remedy}" if self.remedy else message
