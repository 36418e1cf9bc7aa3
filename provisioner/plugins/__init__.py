"""The Pulumi plugins that this project hosts: `docker` and `machineuse`.

A plugin is a gRPC server that the Pulumi engine calls for every resource of its package. The control plane serves
both inside its own process (`host.py`); a plain `pulumi up` starts them as processes (`bin/`, `__main__.py`).
"""

import os

# The control plane forks (it runs the CLI) while gRPC's threads run. gRPC's own handling of forks is for children that
# go on using gRPC; ours exec at once, and the handlers would only delay them and warn. Read when grpc is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
