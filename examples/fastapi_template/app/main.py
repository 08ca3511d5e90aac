import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException
from sqlmodel import select

from app.db import SessionDep, create_tables, engine
from app.models import Item, ItemCreate, ItemPublic, ItemUpdate


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    await create_tables()
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.get("/items", response_model=list[ItemPublic])
async def read_items(session: SessionDep, skip: int = 0, limit: int = 100) -> Any:
    return (await session.exec(select(Item).offset(skip).limit(limit))).all()


@app.get("/items/{id}", response_model=ItemPublic)
async def read_item(session: SessionDep, id: uuid.UUID) -> Any:
    item = await session.get(Item, id)
    if item is None:
        raise HTTPException(404, "Item not found")
    return item


@app.post("/items", response_model=ItemPublic)
async def create_item(session: SessionDep, item_in: ItemCreate) -> Any:
    item = Item.model_validate(item_in)
    session.add(item)
    await session.commit()
    await session.refresh(item)
    return item


@app.patch("/items/{id}", response_model=ItemPublic)
async def update_item(session: SessionDep, id: uuid.UUID, item_in: ItemUpdate) -> Any:
    item = await session.get(Item, id)
    if item is None:
        raise HTTPException(404, "Item not found")
    item.sqlmodel_update(item_in.model_dump(exclude_unset=True))
    session.add(item)
    await session.commit()
    await session.refresh(item)
    return item


@app.delete("/items/{id}", status_code=204)
async def delete_item(session: SessionDep, id: uuid.UUID) -> None:
    item = await session.get(Item, id)
    if item is None:
        raise HTTPException(404, "Item not found")
    await session.delete(item)
    await session.commit()
