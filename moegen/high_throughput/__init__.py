# SPDX-License-Identifier: Apache-2.0
"""Family `ht`, high throughput: large batches, layouts `token` and `packed`; `functional` has gradients.

api calls checks results   the public class, what its arguments must be, what it returns
spec regions roles         kernels' configurations and parameters, where things lie, which blocks do what
select                     Problem -> Specs
ops ops_collective         launches: of the path ipc, and around an all-to-all
reference                  the definition of right, in plain torch
"""
