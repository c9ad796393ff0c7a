"""Requests to Horovod's rendezvous server from somebody who has not the job's secret."""

import os
import urllib.error
import urllib.request


def status(port, method, path, body=None, **headers):
    """Return the HTTP status of a request to this machine."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


class Creates:
    """Pickled, it creates a directory where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
