"""The types that several keys share. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DatasetFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "alpaca_text", "alpaca_chat", "completion", "text"
]
INITS = ("gaussian", "orthogonal", "pissa", "olora", "loftq")
Init = Annotated[
    str,
    Field(
        pattern=rf"^({'|'.join(INITS)}|pissa_niter_[1-9][0-9]{{0,2}})$",
        examples=[*INITS, "pissa_niter_4"],
    ),
]
