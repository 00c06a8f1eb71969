"""Single attempts: what an answer of S3 proves, signing, credentials, dead letters."""

import asyncio
import re
from collections import defaultdict
from contextlib import asynccontextmanager
from hashlib import md5
from types import SimpleNamespace

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from kafka.errors import KafkaTimeoutError, MessageSizeTooLargeError

from config import Failure, S3Error, explain
from kafka_consumer import (
    CHUNK,
    TIMEOUT,
    Answer,
    Bucket,
    Conflict,
    SignedHttp,
    Stats,
    Taken,
    Uploader,
    object_name,
)
from tests.fakes import VirtualLoop, a_record, some_settings


@pytest.fixture
def loop():
    loop = VirtualLoop()
    yield loop
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


# ---------------------------------------------------------------------------- what is an answer


class Answering(Bucket):
    """A bucket whose server gives the answers it is told to, in order."""

    def __init__(self, *answers, honours=True):
        super().__init__(some_settings())
        self.answers, self.asked, self.honours_condition = list(answers), [], honours

    async def request(self, method, name, value=b"", pause=0, **headers):
        self.asked.append((method, name, value, headers))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def methods(self):
        return [method for method, *_ in self.asked]


def digest(value):
    return f'"{md5(value).hexdigest()}"'


def xml(code, message="why"):
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return text.encode()


def made(value=b"v", **headers):
    return Answer(200, {"ETag": digest(value), **headers}, b"")


def there(body=b"v", etag=None, **headers):
    return Answer(200, {"ETag": etag or digest(body), **headers}, body)


REFUSED = Answer(412, {}, xml("PreconditionFailed"))
MISSING = Answer(404, {}, b"")
PAGE = Answer(200, {"Content-Type": "text/html"}, b"<html>log in")
KMS = {"x-amz-server-side-encryption": "aws:kms"}


def test_an_object_is_created_only_where_there_is_none(loop):
    bucket = Answering(made())
    assert loop.run_until_complete(bucket.create("n", b"v")) == "written"
    ((method, name, value, headers),) = bucket.asked
    assert (method, name, value) == ("PUT", "n", b"v")
    assert headers["If-None-Match"] == "*"
    assert headers["Content-MD5"] == "njZp0ZtnW9VwWP1GZCBdKg=="
    assert headers["Content-Type"] == "application/json"


def test_the_same_bytes_already_there_are_a_replay_and_not_read_where_the_etag_is_their_md5(loop):
    bucket = Answering(REFUSED, there())
    assert loop.run_until_complete(bucket.create("n", b"v")) == "replayed"
    assert bucket.methods() == ["PUT", "HEAD"]


@pytest.mark.parametrize(
    ("etag", "headers"), [("0" * 32, KMS), (md5(b"v").hexdigest(), KMS), ("0" * 32 + "-2", {})]
)
def test_the_same_bytes_are_read_where_the_etag_is_no_md5(loop, etag, headers):
    answer = Answer(200, {"ETag": f'"{etag}"', **headers}, b"v")
    bucket = Answering(REFUSED, answer, answer)
    assert loop.run_until_complete(bucket.create("n", b"v")) == "replayed"
    assert bucket.methods() == ["PUT", "HEAD", "GET"]


def test_other_bytes_already_there_are_a_conflict_that_names_the_object(loop):
    bucket = Answering(REFUSED, there(b"other"), there(b"other"))
    with pytest.raises(Conflict, match="s3://bucket/a/n is there with other bytes") as caught:
        loop.run_until_complete(bucket.create("a/n", b"v"))
    assert isinstance(caught.value, Failure)
    assert bucket.methods() == ["PUT", "HEAD", "GET"]


@pytest.mark.parametrize(
    "found",
    [PAGE, there(b"other", etag='"' + "0" * 32 + '"'), Answer(503, {}, xml("SlowDown"))],
)
def test_a_conflict_that_no_answer_proves_is_an_error_that_may_pass(loop, found):
    with pytest.raises(S3Error) as caught:
        loop.run_until_complete(Answering(REFUSED, PAGE, found).create("n", b"v"))
    assert not isinstance(caught.value, Failure)


def test_an_object_that_vanished_meanwhile_may_be_made_next_time(loop):
    with pytest.raises(S3Error, match="now there is none"):
        loop.run_until_complete(Answering(REFUSED, MISSING).create("n", b"v"))


@pytest.mark.parametrize(
    ("status", "text", "code"),
    [
        (503, xml("SlowDown"), "SlowDown"),
        (403, xml("AccessDenied"), "AccessDenied"),
        (409, xml("ConditionalRequestConflict"), "ConditionalRequestConflict"),
        (500, b"", "HTTP 500"),
        (301, b"<html>", "HTTP 301"),
        (204, b"", "HTTP 204"),
        (200, b"", "HTTP 200"),
        (200, xml("InternalError"), "InternalError"),
        (412, b"<html>", "HTTP 412"),
    ],
)
def test_any_other_answer_is_an_error_with_s3s_own_code(loop, status, text, code):
    with pytest.raises(S3Error) as caught:
        loop.run_until_complete(Answering(Answer(status, {}, text)).create("n", b"v"))
    assert caught.value.code == code


def test_an_answer_with_an_error_in_it_is_no_object_even_with_its_etag(loop):
    answer = Answer(200, {"ETag": digest(b"v")}, xml("InternalError"))
    with pytest.raises(S3Error):
        loop.run_until_complete(Answering(answer).create("n", b"v"))


def test_an_etag_that_is_not_the_md5_proves_nothing_and_the_object_is_read(loop):
    odd = Answer(200, {"ETag": '"odd"'}, b"v")
    bucket = Answering(odd, odd, odd)
    assert loop.run_until_complete(bucket.create("n", b"v")) == "written"
    assert bucket.methods() == ["PUT", "HEAD", "GET"]
    with pytest.raises(S3Error, match="was said to be made, and was not"):
        loop.run_until_complete(Answering(odd, MISSING).create("n", b"v"))


def test_with_keys_of_the_users_s3_has_checked_the_bytes_itself(loop):
    bucket = Answering(Answer(200, {"ETag": '"odd"', **KMS}, b""))
    assert loop.run_until_complete(bucket.create("n", b"v")) == "written"
    assert bucket.methods() == ["PUT"]


def test_a_redirect_names_where_it_points_and_what_to_set(loop):
    headers = {"Location": "http://other", "x-amz-bucket-region": "eu-west-3"}
    with pytest.raises(S3Error) as caught:
        loop.run_until_complete(Answering(Answer(307, headers, b"")).create("n", b"v"))
    assert "http://other" in str(caught.value) and "eu-west-3" in str(caught.value)
    assert "S3_ENDPOINT_URL" in str(caught.value)


# ------------------------------------------------------ a server that does not know the condition


def test_the_first_object_of_a_run_is_put_twice_and_the_second_must_be_refused(loop):
    bucket = Answering(MISSING, made(), REFUSED, made(b"w"), honours=False)
    assert loop.run_until_complete(bucket.create("n", b"v")) == "written"
    assert loop.run_until_complete(bucket.create("m", b"w")) == "written"
    assert [name for _, name, *_ in bucket.asked] == ["n", "n", "n", "m"]
    assert bucket.asked[1] == bucket.asked[2]


def test_what_is_there_is_seen_before_a_server_that_may_ignore_the_condition_gets_the_first(loop):
    bucket = Answering(there(b"other"), there(b"other"), honours=False)
    with pytest.raises(Conflict):
        loop.run_until_complete(bucket.create("n", b"v"))
    assert bucket.methods() == ["HEAD", "GET"]


@pytest.mark.parametrize("body", [xml("AccessDenied"), b""])
def test_a_user_who_may_not_look_creates_the_first_object_all_the_same(loop, body):
    denied = Answer(403, {}, body)
    bucket = Answering(denied, denied, made(), REFUSED, honours=False)
    assert loop.run_until_complete(bucket.create("n", b"v")) == "written"
    assert bucket.methods() == ["HEAD", "GET", "PUT", "PUT"]


def test_a_server_that_ignores_the_condition_ends_the_run(loop):
    with pytest.raises(Failure, match=r"ignores If-None-Match.*use one that knows"):
        loop.run_until_complete(Answering(MISSING, made(), made(), honours=False).create("n", b"v"))


def test_a_server_that_does_not_know_the_condition_ends_the_run(loop):
    answer = Answer(501, {}, xml("NotImplemented"))
    with pytest.raises(Failure, match="501 NotImplemented"):
        loop.run_until_complete(Answering(MISSING, answer, honours=False).create("n", b"v"))


def test_a_second_put_without_a_clear_answer_is_tried_again_with_the_next_attempt(loop):
    again = [MISSING, REFUSED, there()]
    bucket = Answering(MISSING, made(), Answer(503, {}, xml("SlowDown")), *again, honours=False)
    with pytest.raises(S3Error):
        loop.run_until_complete(bucket.create("n", b"v"))
    assert not bucket.honours_condition
    assert loop.run_until_complete(bucket.create("n", b"v")) == "replayed"
    assert bucket.honours_condition


def test_after_silence_it_is_asked_first_whether_the_object_is_there(loop):
    bucket = Answering(there())
    assert loop.run_until_complete(bucket.create("n", b"v", check_first=True)) == "replayed"
    assert bucket.methods() == ["HEAD"]
    bucket = Answering(MISSING, made())
    assert loop.run_until_complete(bucket.create("n", b"v", check_first=True)) == "written"
    assert bucket.methods() == ["HEAD", "PUT"]


def test_an_object_that_is_there_does_not_prove_the_condition(loop):
    bucket = Answering(there(), honours=False)
    assert loop.run_until_complete(bucket.create("n", b"v", check_first=True)) == "replayed"
    assert bucket.methods() == ["HEAD"]
    assert not bucket.honours_condition


def test_an_upload_that_is_cut_off_because_the_object_is_there_is_a_replay(loop):
    """A server may refuse it before it has read all of it, and its answer is lost then."""
    cut = aiohttp.ClientOSError("Can not write request body")
    bucket = Answering(cut, there())
    assert loop.run_until_complete(bucket.create("n", b"v")) == "replayed"
    assert bucket.methods() == ["PUT", "HEAD"]
    bucket = Answering(cut, MISSING)
    with pytest.raises(aiohttp.ClientOSError):
        loop.run_until_complete(bucket.create("n", b"v"))


# ----------------------------------------------------------------------------------- one request


class Body:
    def __init__(self, chunks, pause, loop):
        self.chunks, self.pause, self.loop = chunks, pause, loop

    async def iter_any(self):
        for chunk in self.chunks:
            await asyncio.sleep(self.pause)
            yield chunk


class Http:
    """A connection that takes a body chunk by chunk, `pause` seconds each, and then answers."""

    def __init__(self, loop, pause=0.0, chunks=(b"bo", b"dy"), answers=True):
        self.loop, self.pause, self.chunks, self.answers = loop, pause, chunks, answers
        self.seen = []

    @asynccontextmanager
    async def request(self, method, url, *, data, headers, proxy, allow_redirects):
        assert allow_redirects is False
        body = data
        if not isinstance(data, bytes):
            body = b""
            async for chunk in data:
                await asyncio.sleep(self.pause)
                body += chunk
        self.seen.append((method, str(url), body, headers))
        if not self.answers:
            await self.loop.create_future()
        content = Body(self.chunks, self.pause, self.loop)
        yield SimpleNamespace(status=200, headers={"ETag": '"e"'}, content=content)


@pytest.fixture
def wired(loop):
    """Signed requests over a connection that is none: (http, its connection)."""
    http = SignedHttp.__new__(SignedHttp)
    http.address, http.region, http.proxy = "https://s3.test/bucket/", "eu-north-1", None
    http.http = Http(loop)
    return http, http.http


KEYS = SimpleNamespace(access_key="AK", secret_key="SK", token="TOKEN")


def test_an_upload_is_one_signed_request_with_the_bytes_and_no_expect(loop, wired):
    http, connection = wired
    answer = loop.run_until_complete(
        http.send("PUT", "ü b/x=1~.json", KEYS, b"\0\xff", {"If-None-Match": "*"})
    )
    assert (answer.status, answer.body, answer.etag()) == (200, b"body", "e")
    ((method, url, body, headers),) = connection.seen
    assert (method, body) == ("PUT", b"\0\xff")
    assert url == "https://s3.test/bucket/%C3%BC%20b/x%3D1~.json"
    headers = {
        name.lower(): value.decode() if isinstance(value, bytes) else value
        for name, value in headers.items()
    }
    assert headers["if-none-match"] == "*"
    assert headers["content-length"] == "2"
    assert "expect" not in headers
    signed = headers["authorization"]
    assert "AK/" in signed and "/eu-north-1/s3/" in signed and "if-none-match" in signed
    assert headers["x-amz-security-token"] == "TOKEN"


@pytest.mark.parametrize("size", [100, 600_000])
def test_an_upload_that_hangs_ends_after_a_time_of_silence(loop, wired, size):
    http, connection = wired
    connection.answers = False
    began = loop.time()
    with pytest.raises(TimeoutError):
        loop.run_until_complete(http.send("PUT", "n", KEYS, b"x" * size, {}))
    assert loop.time() - began == pytest.approx(TIMEOUT, rel=0.01)


def test_an_upload_over_a_slow_link_may_take_any_time_while_bytes_move(loop, wired):
    http, connection = wired
    connection.pause = TIMEOUT * 0.9
    value = b"x" * (10 * CHUNK)
    began = loop.time()
    answer = loop.run_until_complete(http.send("PUT", "n", KEYS, value, {}))
    assert answer.status == 200 and answer.body == b"body"
    assert connection.seen[0][2] == value
    assert loop.time() - began > 10 * TIMEOUT * 0.9


def test_an_answer_that_trickles_is_no_answer_in_time(loop, wired):
    http, connection = wired
    connection.pause = TIMEOUT / 3
    connection.chunks = [b"-"] * 100
    began = loop.time()
    with pytest.raises(TimeoutError):
        loop.run_until_complete(http.send("PUT", "n", KEYS, b"v", {}))
    assert loop.time() - began < 3 * TIMEOUT


@pytest.mark.parametrize("form", ['W/"%s"', '"%s"'])
def test_an_etag_is_the_md5_in_any_form(form):
    etag = form % md5(b"v").hexdigest().upper()
    assert Answer(200, {"ETag": etag}, b"").has_md5(b"v")


def test_an_error_of_s3_is_said_as_plain_text():
    answer = Answer(400, {}, xml("AuthorizationHeaderMalformed", "expecting &#34;us-east-1&#34;"))
    assert 'expecting "us-east-1"' in explain(answer.error())


# ---------------------------------------------------------------------------------- credentials


class Credentials:
    def __init__(self, name, error=None):
        self.name, self.error = name, error

    async def get_frozen_credentials(self):
        if self.error:
            raise self.error
        return self.name


class Renewing(Bucket):
    """A bucket that finds these credentials, one a look, and notes when it looked."""

    def __init__(self, loop, *found):
        super().__init__(some_settings())
        self.loop, self.found, self.looked = loop, list(found), []
        self.credentials, self.keys_until = Credentials("old"), 0.0

    async def find_credentials(self):
        self.looked.append(self.loop.time())
        found = self.found.pop(0) if self.found else None
        if found is None:
            raise NoCredentialsError
        if found == "hangs":
            await self.loop.create_future()
        self.credentials, self.keys_until = Credentials(found), 0.0


EXPIRED = S3Error("ExpiredToken", "why")


def renewed(loop, bucket, seconds, error=EXPIRED):
    async def often():
        until = loop.time() + seconds
        while loop.time() < until:
            await bucket.renew(error)
            await asyncio.sleep(0.05)

    loop.run_until_complete(often())


def test_new_credentials_are_looked_for_at_a_growing_distance(loop):
    bucket = Renewing(loop)
    renewed(loop, bucket, 30)
    pauses = [b - a for a, b in zip(bucket.looked, bucket.looked[1:], strict=False)]
    assert 10 <= len(bucket.looked) <= 20
    assert pauses[0] < 1 and all(1.9 <= pause <= 2.2 for pause in pauses[4:])


def test_after_errors_that_are_not_of_credentials_they_are_looked_for_seldom(loop):
    bucket = Renewing(loop)
    renewed(loop, bucket, 300, S3Error("SlowDown", "why"))
    pauses = [b - a for a, b in zip(bucket.looked, bucket.looked[1:], strict=False)]
    assert all(30 <= pause <= 30.2 for pause in pauses[-3:])


def test_those_in_use_stay_until_others_are_there(loop):
    bucket = Renewing(loop, None, None, "new")
    assert loop.run_until_complete(bucket.keys()) == "old"
    loop.run_until_complete(bucket.renew(EXPIRED))
    assert loop.run_until_complete(bucket.keys()) == "old"
    renewed(loop, bucket, 5)
    assert loop.run_until_complete(bucket.keys()) == "new"


def test_a_lookup_that_hangs_is_given_up_after_a_minute_and_tried_again(loop, lines):
    bucket = Renewing(loop, "hangs", "new")
    began = loop.time()
    loop.run_until_complete(bucket.renew(EXPIRED))
    assert loop.time() - began == pytest.approx(60)
    assert "still waiting for the AWS credentials" in lines()[0]
    renewed(loop, bucket, 5)
    assert loop.run_until_complete(bucket.keys()) == "new"


def test_keys_are_asked_for_again_every_second_since_they_may_have_been_renewed(loop):
    bucket = Renewing(loop)

    async def keys(pause):
        await asyncio.sleep(pause)
        return await bucket.keys()

    assert loop.run_until_complete(keys(0)) == "old"
    bucket.credentials.name = "renewed"
    assert loop.run_until_complete(keys(0.5)) == "old"
    assert loop.run_until_complete(keys(0.6)) == "renewed"


def test_while_new_credentials_are_looked_for_no_other_look_begins(loop):
    bucket = Renewing(loop, "hangs")

    async def as_many_uploads_fail():
        await asyncio.gather(*(bucket.renew(EXPIRED) for _ in range(64)))

    loop.run_until_complete(as_many_uploads_fail())
    assert len(bucket.looked) == 1


def test_one_renewal_is_waited_for_by_all(loop):
    bucket = Renewing(loop)
    asked = []

    class Slow(Credentials):
        async def get_frozen_credentials(self):
            asked.append(loop.time())
            await asyncio.sleep(4)
            return "slow"

    bucket.credentials = Slow("slow")

    async def all_of_them():
        return await asyncio.gather(*(bucket.keys() for _ in range(64)))

    assert loop.run_until_complete(all_of_them()) == ["slow"] * 64
    assert len(asked) == 1


def test_credentials_that_never_come_are_said_as_such(loop):
    class Never(Credentials):
        async def get_frozen_credentials(self):
            await loop.create_future()

    bucket = Renewing(loop)
    bucket.credentials = Never("never")
    with pytest.raises(S3Error) as caught:
        loop.run_until_complete(bucket.keys())
    assert caught.value.code == "CredentialsTimeout"
    assert "renew the AWS credentials" in explain(caught.value)


def test_credentials_that_their_service_refuses_are_no_denial_by_s3(loop):
    bucket = Renewing(loop)
    bucket.credentials = Credentials("none", client_error("AccessDenied"))
    with pytest.raises(S3Error) as caught:
        loop.run_until_complete(bucket.keys())
    assert caught.value.code == "CredentialRetrievalError"
    assert "AccessDenied" in str(caught.value)


def client_error(code, message="why"):
    return ClientError({"Error": {"Code": code, "Message": message}}, "ListObjectsV2")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (S3Error("SlowDown", "Please reduce\nyour rate"), "SlowDown: Please reduce your"),
        (S3Error("HTTP 500", ""), "HTTP 500"),
        (S3Error("AccessDenied", "why"), "does the policy allow"),
        (client_error("ExpiredToken"), "ExpiredToken: why (check or renew the AWS credentials)"),
        (client_error("NoSuchBucket"), "correct S3_BUCKET"),
        (NoCredentialsError(), "renew the AWS credentials"),
        (TimeoutError(), "no answer in time"),
        (EndpointConnectionError(endpoint_url="http://x"), "http://x"),
        (KafkaTimeoutError("slow"), "KafkaTimeoutError: slow"),
        (ClientError({}, "Op"), "ClientError"),
    ],
)
def test_an_error_is_one_line_with_what_to_try(error, said):
    assert said in re.sub(
        r"KafkaTimeoutError: KafkaTimeoutError", "KafkaTimeoutError", explain(error)
    )
    assert "\n" not in explain(error)


# -------------------------------------------------------------------------------------- attempts


class Store:
    """A bucket in memory whose failures are `fails(name, attempt)`: an error, or None."""

    def __init__(self, loop, fails=lambda name, attempt: None, took=0.02):
        self.loop, self.fails, self.took = loop, fails, took
        self.objects, self.attempts, self.checked_first = {}, defaultdict(int), []
        self.now = self.most = self.renewed = self.renew_pause = 0

    async def create(self, name, value, check_first):
        self.attempts[name] += 1
        self.checked_first.append(check_first)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.took)
        self.now -= 1
        if error := self.fails(name, self.attempts[name]):
            raise error
        replay = name in self.objects
        self.objects[name] = value
        return "replayed" if replay else "written"

    async def renew(self, error):
        self.renewed += 1


class Letter:
    """The client's future of a message; ended by `end`."""

    def __init__(self):
        self.exception, self.ended, self.callbacks = None, False, []

    def add_both(self, callback):
        self.callbacks.append(callback)
        if self.ended:
            callback(None)

    def end(self, error=None):
        self.exception, self.ended = error, True
        for callback in self.callbacks:
            callback(None)

    def failed(self):
        return self.exception is not None


class Letters:
    """A producer to the dead letter topic: `answers` are what its futures do, one a send: an
    error, None: acknowledged, or "waits"."""

    def __init__(self, *answers):
        self.answers, self.sent, self.letters = list(answers), [], []

    def send(self, topic, value, key, headers):
        self.sent.append((topic, value, key, headers))
        letter = Letter()
        self.letters.append(letter)
        answer = self.answers.pop(0) if self.answers else None
        if answer != "waits":
            letter.end(answer)
        return letter


class Attempts:
    """An uploader on a virtual loop."""

    def __init__(self, loop, bucket, concurrency=8):
        self.loop, self.bucket, self.seconds = loop, bucket, []
        settings = some_settings(S3_MAX_CONCURRENCY=str(concurrency))
        stats = Stats(observe_upload=self.seconds.append)
        self.uploader = Uploader(settings, bucket, stats, loop)

    def begin(self, *records):
        """One attempt for each."""
        self.taken = [Taken(record) for record in records]
        self.uploader.start(self.taken)

    def again(self, error=None):
        for taken in self.taken:
            taken.error = error
        self.uploader.start(self.taken)

    def pass_(self, seconds):
        """What has come of the attempts after so many seconds; None: nothing yet."""
        self.loop.run_until_complete(asyncio.sleep(seconds))
        return [
            (taken.attempt.exception() or taken.attempt.result()) if taken.attempt.done() else None
            for taken in self.taken
        ]


def test_records_become_objects_with_their_bytes_as_many_at_once_as_allowed(loop):
    up = Attempts(loop, Store(loop), concurrency=5)
    given = [a_record(n, b'{"n": %d}' % n) for n in range(40)]
    up.begin(*given)
    assert up.pass_(10) == ["written"] * 40
    assert up.bucket.objects == {object_name("", 0, r.offset): r.value for r in given}
    assert up.bucket.most == 5
    assert len(up.seconds) == 40 and all(s == pytest.approx(0.02) for s in up.seconds)


def test_a_record_that_is_there_already_is_replayed(loop):
    up = Attempts(loop, Store(loop))
    up.bucket.objects["stock_market_7.json"] = b"{}"
    up.begin(a_record())
    assert up.pass_(1) == ["replayed"]


def test_an_attempt_is_made_once_and_its_error_is_handed_back(loop):
    error = S3Error("SlowDown", "why")
    up = Attempts(loop, Store(loop, lambda name, n: error))
    up.begin(a_record(0), a_record(1))
    assert up.pass_(10) == [error, error]
    assert set(up.bucket.attempts.values()) == {1}


def test_an_attempt_that_was_cancelled_before_its_turn_sends_nothing(loop):
    up = Attempts(loop, Store(loop), concurrency=1)
    up.begin(a_record(0), a_record(1))
    assert up.taken[1].attempt.cancel()
    loop.run_until_complete(asyncio.sleep(1))
    assert set(up.bucket.objects) == {"stock_market_0.json"}


def test_a_conflict_is_handed_back_and_the_others_go_on(loop):
    def fails(name, attempt):
        return Conflict("other bytes") if name == "stock_market_3.json" else None

    up = Attempts(loop, Store(loop, fails))
    up.begin(*(a_record(n) for n in range(6)))
    outcomes = up.pass_(1)
    assert isinstance(outcomes[3], Conflict)
    assert outcomes.count("written") == 5


def test_after_any_error_new_credentials_are_looked_for(loop):
    for error in (client_error("ExpiredToken"), S3Error("SlowDown", "why"), TimeoutError()):
        up = Attempts(loop, Store(loop, lambda name, n, error=error: error))
        up.begin(a_record())
        up.pass_(1)
        assert up.bucket.renewed == 1


def test_only_after_silence_is_the_object_looked_for_first(loop):
    up = Attempts(loop, Store(loop))
    up.begin(a_record())
    up.pass_(1)
    up.again(S3Error("SlowDown", "why"))
    up.pass_(1)
    up.again(TimeoutError())
    up.pass_(1)
    assert up.bucket.checked_first == [False, False, True]


def test_a_flawed_record_goes_unchanged_to_the_dead_letter_topic(loop):
    up = Attempts(loop, Store(loop))
    up.uploader.producer = letters = Letters()
    up.begin(a_record(3, b"\xffbad", partition=2, key=b"k", headers=[("mine", b"1"), ("n", None)]))
    assert up.pass_(1) == ["dead"]
    ((topic, value, key, headers),) = letters.sent
    assert (topic, value, key) == ("error_topic", b"\xffbad", b"k")
    assert headers[:2] == [("mine", b"1"), ("n", b"")]
    reason = headers[2]
    assert reason[0] == "error.reason" and reason[1].startswith(b"not UTF-8")
    assert headers[3:] == [
        ("source.topic", b"test"),
        ("source.partition", b"2"),
        ("source.offset", b"3"),
    ]
    assert not up.bucket.objects


def test_a_dead_letter_with_neither_key_nor_value_can_be_sent(loop):
    up = Attempts(loop, Store(loop))
    up.uploader.producer = letters = Letters()
    up.begin(a_record(0, None), a_record(1, None, key=b"k"), a_record(2, b""))
    assert up.pass_(1) == ["dead"] * 3
    assert [(value, key) for _, value, key, _ in letters.sent] == [
        (None, b""),
        (None, b"k"),
        (b"", None),
    ]


def test_a_dead_letter_under_way_is_waited_for_and_not_sent_twice(loop):
    up = Attempts(loop, Store(loop))
    up.uploader.producer = letters = Letters("waits")
    up.begin(a_record(0, b"bad"))
    (error,) = up.pass_(5)
    assert isinstance(error, TimeoutError)
    up.again(error)
    assert up.pass_(1) == [None]
    letters.letters[0].end()
    assert up.pass_(1) == ["dead"]
    assert len(letters.sent) == 1
    assert not up.uploader.letters


def test_while_the_dead_letter_topic_is_missing_one_letter_finds_it_out_for_all(loop):
    class NoTopic:
        asked = 0

        def send(self, *args, **kwargs):
            self.asked += 1
            loop.now += 0.5  # the client waits for the topic's metadata
            raise KafkaTimeoutError("Failed to update metadata")

    up = Attempts(loop, Store(loop), concurrency=64)
    up.uploader.producer = producer = NoTopic()
    up.begin(*(a_record(n, b"bad") for n in range(64)))
    outcomes = up.pass_(1)
    assert [type(outcome) for outcome in outcomes] == [KafkaTimeoutError] * 64
    assert producer.asked == 1


def test_an_attempt_taken_back_before_the_loop_came_to_it_is_let_go(loop):
    up = Attempts(loop, Store(loop))
    up.begin(a_record(0), a_record(1))
    attempt = up.taken[0].attempt
    assert attempt.cancel()
    up.taken[0].attempt = None  # as Sink.fail does
    loop.run_until_complete(asyncio.sleep(1))
    assert set(up.bucket.objects) == {"stock_market_1.json"}
    assert not up.uploader.tasks


def test_a_refused_dead_letter_is_an_error_and_sent_again(loop):
    up = Attempts(loop, Store(loop))
    up.uploader.producer = letters = Letters(*[MessageSizeTooLargeError("big")] * 2)
    up.begin(a_record(0, b"bad"))
    for _ in range(2):
        (error,) = up.pass_(1)
        assert isinstance(error, MessageSizeTooLargeError)
        up.again(error)
    assert up.pass_(1) == ["dead"]
    assert len(letters.sent) == 3
