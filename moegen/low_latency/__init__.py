# SPDX-License-Identifier: Apache-2.0
"""Family `ll`, low latency: small batches, rows go straight into per-source staging of the receiver.

api checks results   the public class, what its arguments must be, what it returns
spec regions roles   kernels' configurations and parameters, where things lie, which blocks do what
select               Problem -> Specs, by the table of `moegen.tuning`
ops ops_collective   launches: of the path ipc, and around an all-to-all
reference            the definition of right, in plain torch
"""
