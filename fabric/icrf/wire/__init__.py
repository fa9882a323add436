"""The wire: the only place that sees protobuf, gRPC's channels and certificates."""

import os

# Before gRPC is loaded: what it writes to standard error about a failed handshake, our errors say in one line.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
