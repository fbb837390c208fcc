# SPDX-License-Identifier: Apache-2.0
"""`python -m moegen` is the command `moegen`."""

from moegen.cli.main import main

if __name__ == "__main__":
    main()
