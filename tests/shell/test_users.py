"""When Dovecot is asked for its users, and what an answer changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Union

import pytest

from dovesyncd import users as users_module
from dovesyncd.core.errors import DovecotError
from dovesyncd.core.model import User
from dovesyncd.userdb import Account, Accounts
from dovesyncd.users import Users
from tests.shell.waiting import settled, until


def accounts(*names: str, problems: tuple[str, ...] = ()) -> Accounts:
    found = {User(name): Account(User(name), f"/m/{name}", None, f"/m/{name}", "", "") for name in names}
    return Accounts(found, list(problems))


class Scene:
    """``answers`` are given in turn, the last one for ever."""

    def __init__(self, answers: tuple[Union[Accounts, Exception], ...], refresh: float) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.told: list[list[str]] = []
        self.users = Users(self.ask, self.tell, refresh)
        self.task = asyncio.get_running_loop().create_task(self.users.run())

    async def ask(self) -> Accounts:
        self.asked += 1
        await asyncio.sleep(0)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def tell(self, found: Accounts) -> None:
        self.told.append(sorted(found.accounts))


@asynccontextmanager
async def scene(*answers: Union[Accounts, Exception], refresh: float = 3600) -> AsyncIterator[Scene]:
    it = Scene(answers, refresh)
    try:
        yield it
    finally:
        it.task.cancel()
        done, _ = await asyncio.wait({it.task}, timeout=5)
        assert done, "it ends when it is cancelled"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users_module, "_LEAST_GAP", 0.01)
    monkeypatch.setattr(users_module, "_RETRY_FIRST", 0.002)
    monkeypatch.setattr(users_module, "_RETRY_LAST", 0.004)


async def test_asked_at_the_start_and_then_only_on_a_hint() -> None:
    async with scene(accounts("ann"), accounts("ann", "bob")) as it:
        await until(lambda: it.told == [["ann"]], "the first answer")
        await settled(lambda: it.asked == 1, "no more questions")
        it.users.hint()
        it.users.hint()
        await until(lambda: it.told == [["ann"], ["ann", "bob"]], "the second answer")
        await settled(lambda: it.asked == 2, "one question for two hints")


async def test_asked_at_intervals() -> None:
    async with scene(accounts("ann"), refresh=0.005) as it:
        await until(lambda: it.asked >= 4, "four questions")


async def test_a_hint_during_a_question_asks_again() -> None:
    async with scene(accounts("ann"), accounts("ann", "bob")) as it:
        await until(lambda: it.asked == 1, "the first question")
        it.users.hint()
        await until(lambda: it.told == [["ann"], ["ann", "bob"]], "the second answer")


async def test_failures_are_retried_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    error = DovecotError("doveadm user '*' failed")
    async with scene(accounts("ann"), error, error, error, error, accounts("bob")) as it:
        await until(lambda: it.told == [["ann"]], "the first answer")
        it.users.hint()
        await until(lambda: it.told == [["ann"], ["bob"]], "it works again")
        assert it.asked == 6
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "The users can't be listed: doveadm user '*' failed; keeping the 1 known",
        "The users can be listed again",
    ]


async def test_an_empty_list_forgets_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async with scene(accounts("ann"), accounts(), accounts("bob")) as it:
        await until(lambda: it.told == [["ann"]], "the first answer")
        it.users.hint()
        await until(lambda: it.asked == 2, "the second question")
        it.users.hint()
        await until(lambda: it.told == [["ann"], ["bob"]], "the third answer")
    assert caplog.text.count("lists no users where there were 1") == 1


async def test_a_site_without_users_yet() -> None:
    async with scene(accounts(), accounts("ann")) as it:
        await until(lambda: it.told == [[]], "the first answer")
        it.users.hint()
        await until(lambda: it.told == [[], ["ann"]], "the first user")


async def test_a_problem_is_said_until_it_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    with_problem = accounts("ann", problems=("left out user 'x'",))
    async with scene(with_problem, with_problem, accounts("ann"), with_problem) as it:
        for count in range(1, 5):
            await until(lambda count=count: len(it.told) == count, f"answer {count}")  # type: ignore[misc]
            it.users.hint()
    assert caplog.text.count("left out user 'x'") == 2


async def test_a_hint_does_not_swallow_the_end() -> None:
    async with scene(accounts("ann")) as it:
        await until(lambda: it.told, "the first answer")
        await settled(lambda: it.asked == 1, "it waits")
        it.users.hint()
        # The cancellation of the end comes in the same turn.


async def test_another_error_ends_it() -> None:
    async with scene(ValueError("a bug")) as it:
        await until(it.task.done, "the end")
        with pytest.raises(ValueError, match="a bug"):
            it.task.result()


async def test_a_user_who_is_not_quite_there_is_asked_for_again_soon() -> None:
    half = accounts("ann", problems=("left out user 'bob': the user doesn't exist",))
    async with scene(half, half, accounts("ann", "bob")) as it:
        await until(lambda: it.told[-1:] == [["ann", "bob"]], "bob, long before the refresh")
        await settled(lambda: it.asked == 3, "then only at the refresh")
