"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FedFile = Annotated[Path, typer.Argument(metavar="FED.yaml", help="The federation.", show_default=False)]
RunId = Annotated[str, typer.Argument(metavar="ID", help="Run id, or its first characters.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="End standard output with one line of JSON.")]
Plain = Annotated[bool, typer.Option("--plain", help="No colour, nothing redrawn.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("-o", "--override", metavar="KEY=VALUE", help="Replace a value of the file; may be repeated."),
]
Log = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="KIND:TARGET",
        help="Send metrics on: tensorboard:DIR, csv:FILE, jsonl:FILE, sqlite:FILE or module:attr; may be repeated.",
    ),
]
Profile = Annotated[
    bool,
    typer.Option("--profile", help="Show where the rounds' time went, per host; profile.jsonl has each round."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder.", show_default="runs/ID")]
Wan = Annotated[
    str | None,
    typer.Option(
        "--wan",
        metavar="SHAPE",
        help="Put lines like this between the clusters, for example 80ms,50mbit: round trip, rate[, jitter=5ms].",
        show_default=False,
    ),
]
Clusters = Annotated[int, typer.Option("--clusters", min=1, max=64, metavar="N", help="How many local Ray clusters.")]
Mediator = Annotated[
    str,
    typer.Option("--mediator", envvar="ICRF_MEDIATOR", metavar="HOST:PORT", help="The fabric's mediator."),
]
TlsDir = Annotated[
    Path | None,
    typer.Option("--tls-dir", envvar="ICRF_TLS_DIR", metavar="DIR", help="Your certificate.", show_default="plaintext"),
]
