"""The same database over other drivers."""

from __future__ import annotations

import pytest
import sqlalchemy as sa


def url_of(url: sa.URL, driver: str) -> sa.URL:
    """The same database over another driver; pg8000 is told of sockets in a way of its own."""
    pytest.importorskip(driver.removesuffix("_async"))
    host = url.query.get("host", url.host)
    target = url.set(drivername=f"postgresql+{driver}")
    if driver == "pg8000" and isinstance(host, str) and host.startswith("/"):
        socket = f"{host}/.s.PGSQL.{url.port or url.query.get('port', 5432)}"
        return target.set(host=None, port=None, query={"unix_sock": socket})
    return target
