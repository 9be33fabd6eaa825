"""A judge that is none: speaks OpenAI's protocol on this machine so that MT-Bench runs end to end without one. Its scores mean nothing.

Usage: python evaluation/stand_in_judge.py COMMAND ...  runs the command with OPENAI_BASE_URL pointing here.
"""

import json
import os
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandIn(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rating = 1 + zlib.crc32(request["messages"][-1]["content"].encode()) % 10
        reply = {"choices": [{"index": 0, "message": {"role": "assistant", "content": f"A stand-in cannot tell. Rating: [[{rating}]]"}}]}
        body = json.dumps(reply).encode()
        self.send_response(200 if self.path.endswith("/chat/completions") else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Silent: the command's own output is what matters."""


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = {"OPENAI_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1", "OPENAI_API_KEY": "none", "JUDGE_MODEL": "stand-in"}
    sys.exit(subprocess.run(sys.argv[1:], env=os.environ | where).returncode)


if __name__ == "__main__":
    main()
