"""Both state machines of an attempt, each as one table.

**A site.** An attempt begins when its keys are advertised and goes one way. Each stage is a class that holds
what that stage needs and nothing else: the mask seed and the private keys end with the upload, the shares of
peers exist from the upload on, a survivor set exists only where the site has signed one. A closed attempt has
no class: its number is all that is left of it.

    (keys)  ADVERTISED --share--> SHARED --upload--> UPLOADED --confirm--> CONFIRMED
                                                        |                      |
                                                        +-------unmask---------+--> CLOSED

A site has at most one attempt before its upload (prepared) and at most one after it (open). Advertising
closes what is prepared, uploading closes what is open, a restart closes both; none of these is a step of the
attempt itself, so none is in the table. Whatever is not in it is refused as out of order.

**The server.** It collects one kind of reply at a time. Each step closes the collection before it, and aborts
where fewer than t sites answered:

    NEW --ask_keys--> KEYS --ask_shares--> SHARES --ask_uploads--> UPLOADS --close_uploads--> SURVIVORS
    SURVIVORS --ask_confirmations--> CONFIRMATIONS --ask_reveals--> REVEALS --unmask--> DONE
    SURVIVORS --ask_reveals (nobody dropped)--> REVEALS

ABORTED follows from every step that finds too few answers, and from a bad dealer.
"""

from __future__ import annotations

from enum import StrEnum

from privacy.secagg.reasons import Component


class SiteStage(StrEnum):
    """Where an attempt stands at a site. There is no way back."""

    ADVERTISED = "advertised"
    SHARED = "shared"
    UPLOADED = "uploaded"
    CONFIRMED = "confirmed"
    CLOSED = "closed"


SITE_TRANSITIONS: dict[tuple[SiteStage, Component], SiteStage] = {
    (SiteStage.ADVERTISED, Component.SHARE): SiteStage.SHARED,
    (SiteStage.SHARED, Component.UPLOAD): SiteStage.UPLOADED,
    (SiteStage.UPLOADED, Component.CONFIRM): SiteStage.CONFIRMED,
    (SiteStage.UPLOADED, Component.UNMASK): SiteStage.CLOSED,
    (SiteStage.CONFIRMED, Component.UNMASK): SiteStage.CLOSED,
}
"""All that a site ever does with an attempt: every other pair of stage and component is refused."""


class ServerStage(StrEnum):
    """Where an attempt stands at the server."""

    NEW = "new"
    KEYS = "keys"
    SHARES = "shares"
    UPLOADS = "uploads"
    SURVIVORS = "survivors"
    CONFIRMATIONS = "confirmations"
    REVEALS = "reveals"
    DONE = "done"
    ABORTED = "aborted"


class ServerStep(StrEnum):
    """What the round driver tells the server to do next."""

    ASK_KEYS = "ask_keys"
    ASK_SHARES = "ask_shares"
    ASK_UPLOADS = "ask_uploads"
    CLOSE_UPLOADS = "close_uploads"
    ASK_CONFIRMATIONS = "ask_confirmations"
    ASK_REVEALS = "ask_reveals"
    UNMASK = "unmask"


SERVER_TRANSITIONS: dict[tuple[ServerStage, ServerStep], ServerStage] = {
    (ServerStage.NEW, ServerStep.ASK_KEYS): ServerStage.KEYS,
    (ServerStage.KEYS, ServerStep.ASK_SHARES): ServerStage.SHARES,
    (ServerStage.SHARES, ServerStep.ASK_UPLOADS): ServerStage.UPLOADS,
    (ServerStage.UPLOADS, ServerStep.CLOSE_UPLOADS): ServerStage.SURVIVORS,
    (ServerStage.SURVIVORS, ServerStep.ASK_CONFIRMATIONS): ServerStage.CONFIRMATIONS,
    (ServerStage.SURVIVORS, ServerStep.ASK_REVEALS): ServerStage.REVEALS,
    (ServerStage.CONFIRMATIONS, ServerStep.ASK_REVEALS): ServerStage.REVEALS,
    (ServerStage.REVEALS, ServerStep.UNMASK): ServerStage.DONE,
}
"""All that the server ever does: every other pair is a bug of the driver (InternalError)."""

COLLECTS: dict[ServerStage, Component] = {
    ServerStage.KEYS: Component.ADVERTISE,
    ServerStage.SHARES: Component.SHARE,
    ServerStage.UPLOADS: Component.UPLOAD,
    ServerStage.CONFIRMATIONS: Component.CONFIRM,
    ServerStage.REVEALS: Component.UNMASK,
}
"""Whose replies are taken in at a stage; at every other one a reply is late."""
