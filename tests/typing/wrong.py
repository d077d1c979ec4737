"""Uses of the public names that a type checker refuses."""

import sandboxcore
from sandboxcore import Limits, Mount, SandboxSpec

SandboxSpec("standard")  # error: call-arg
SandboxSpec(network="bridge")  # error: arg-type
SandboxSpec(unknown=1)  # error: call-arg
Limits(pids="5")  # error: arg-type
Mount(kind="union", target="/x")  # error: arg-type
sandboxcore.run(["true"], shell=True)  # error: call-arg
sandboxcore.run(["true"], timeout="5")  # error: arg-type
nothing = sandboxcore.run(["true"]).no_such_field  # error: attr-defined
