# SPDX-License-Identifier: Apache-2.0
"""Family `a2a`, one-sided: payloads of any width, layout `rank`.

api checks results   the public class, what its arguments must be, what it returns
spec regions roles   kernels' configurations and parameters, where things lie, which blocks do what
select               Problem -> Specs
ops ops_collective   launches: of the path ipc, and around an all-to-all
reference            the definition of right, in plain torch
"""
