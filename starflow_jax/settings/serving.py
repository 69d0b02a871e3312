"""The server."""

import dataclasses
import ipaddress

from starflow_jax.settings.fields import Allowed, Settings, at_least, names, one_of, positive, setting


@dataclasses.dataclass(frozen=True)
class Serve(Settings):
    """A page and an HTTP API where videos are made and steered."""

    host: str = setting("127.0.0.1", "address to listen on; beyond this machine (0.0.0.0) a token is needed")
    port: int = setting(8000, "port to listen on; 0: any that is free",
                        at_least(0, "any that is free", most=65_535))
    token_file: str = setting("", "a file with the token that clients must show; empty: none is needed")
    origins: str = setting("", "further addresses under which browsers reach the page, comma-separated, such as "
                           "https://video.example.org",
                           Allowed("comma-separated origins, such as https://video.example.org", lambda value: not value
                                   or all(one.startswith(("http://", "https://")) and one.count("/") == 2
                                          for one in names(value))))
    sessions: int = setting(4, "sessions that are live at once", positive(256))
    together: str = setting("auto", "how their latent frames are made: as one program, compiled for 1, 2, 4, ... "
                            "sessions (batch); by a thread for each core (cores); one after the other (turns); or the "
                            "fastest of these for the device (auto)", one_of("auto", "batch", "cores", "turns"))
    queue: int = setting(16, "further ones that may wait for a place", at_least(0, "none", most=10_000))
    frames: int = setting(3_600, "most pixel frames of one session or video", positive(1_000_000))
    compared: int = setting(2, "sessions that may be compared with another prompt at once",
                            at_least(0, "none", most=256))
    idle_seconds: float = setting(60.0, "seconds after which a session ends whose client says nothing, or does not "
                                  "read what it is sent", positive(86_400))
    videos: int = setting(32, "videos of jobs that are kept, the newest ones", positive(10_000))
    rate: int = setting(60, "sessions and videos that one client may begin in a minute", positive(100_000))
    prompt_bytes: int = setting(2_000, "longest prompt", positive(1_000_000))
    upload_bytes: int = setting(8_000_000, "largest request, with its picture or video", positive(1_000_000_000))

    @property
    def local(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check(self) -> None:
        self.require("host", bool(self.host.strip()), "must be an address, such as 127.0.0.1")

    def check_safe(self) -> None:
        """Raises UserError for an address beyond this machine without a token."""
        self.require("host", self.local or bool(self.token_file),
                     "is reached from other machines; name a file with a token for them, serve.token_file=FILE")
