"""What the server counts, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1, 2, 5, 10, 30)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.sessions = Gauge("starflow_sessions", "Sessions that are live", registry=registry)
        self.queue = Gauge("starflow_queue", "Sessions that wait for a place", registry=registry)
        self.frames = Counter("starflow_frames", "Frames that were made; their rate is frames per second",
                              registry=registry)
        self.first_frame = Histogram("starflow_first_frame_seconds", "From a session's place to its first frame",
                                     buckets=SECONDS, registry=registry)
        self.change = Histogram("starflow_change_seconds", "From a change to the first frame that was made under it",
                                buckets=SECONDS, registry=registry)
        self.out_of_memory = Counter("starflow_out_of_memory", "Sessions that ended for lack of device memory",
                                     registry=registry)
        self.errors = Counter("starflow_errors", "Errors of the server itself", registry=registry)
        self.refused = Counter("starflow_refused", "Requests that were refused, by status", ["status"],
                               registry=registry)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
