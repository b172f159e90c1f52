"""Ask the status server of this container whether the run is well: what HEALTHCHECK calls.

Started every few seconds, as a file without the package around it: `python3 -I -S probe.py`. With
`--alive`, any answer will do: a liveness probe must not end a run that restarts its own worker.
"""

import http.client
import os
import sys


def main() -> int:
    """Print the answer of /health; return 0 if the run is well, or answers at all with --alive."""
    port = int(os.environ.get("HEALTH_PORT") or 8080)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        text = answer.read(2000).decode("utf-8", "replace")
    except OSError as error:
        sys.stderr.write(f"no answer on port {port}: {error}\n")
        return 1
    sys.stdout.write(f"{text}\n")
    return int(answer.status != http.client.OK and "--alive" not in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
