from __future__ import annotations

import html
import json
from urllib.parse import quote

import pytest

from qvl_pipeline.secrets import file_without_secrets, names_secret, url_holds_secret, without_secrets


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SOME_KEY", "on")


def test_secrets_are_masked_and_nothing_else() -> None:
    values = {
        "command": "kedro run --params a.token=xyz,b=1 --on 0123456789abcdef",
        "presigned": "https://host/x?X-Amz-Signature=abc&part=1",
        "hf_token": "abc",
        "nested": [{"password": "p"}, "s3://key:secret@bucket/x"],
        "max_new_tokens": 8,
        "special_tokens": ["a"],
        "url": "https://host/x@y",
        "folder": "/home/me/monkey=3",
    }
    assert without_secrets(values) == {
        "command": "kedro run --params a.token=***,b=1 --on ***",
        "presigned": "https://host/x?***",
        "hf_token": "***",
        "nested": [{"password": "***"}, "s3://***@bucket/x"],
        "max_new_tokens": 8,
        "special_tokens": ["a"],
        "url": "https://host/x@y",
        "folder": "/home/me/monkey=3",
    }


@pytest.mark.parametrize(
    "text",
    [
        "https://x.blob.core.windows.net/a?sv=2024&sig=S3CRET%3D",
        "curl -H 'Authorization: Bearer S3CRET' https://host",
        '{"Authorization": "S3CRET"}',
        "key=S3CRET",
        "auth=S3CRET,b=1",
        "mysql pwd=S3CRET",
        'password="S3CRET of two words"',
        "secret: S3CRET",
        '{"api_key": "S3CRET"}',
        "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=S3CRET==;EndpointSuffix=net",
        "SharedAccessSignature=sv=2024&sig=S3CRET",
    ],
)
def test_a_secret_is_known_by_its_place(text: str) -> None:
    masked = without_secrets(text)
    assert "***" in masked
    assert "S3CRET" not in masked
    assert "two words" not in masked


@pytest.mark.parametrize(
    "name",
    [
        *(
            "GITHUB_PAT",
            "PGPASSWD",
            "DB_PASSWD",
            "AZURE_SAS",
            "MYAPIKEY",
            "AZURE_STORAGE_CONNECTION_STRING",
            "HF_TOKEN",
        ),
        *("X-Amz-Signature", "AccountKey", "auth", "sas_token"),
    ],
)
def test_names_of_secrets_end_in_what_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names_secret(name)
    monkeypatch.setenv(name, "a b&c-S3CRET")
    for written in ("a b&c-S3CRET", quote("a b&c-S3CRET"), html.escape("a b&c-S3CRET"), json.dumps("a b&c-S3CRET")):
        assert "S3CRET" not in file_without_secrets(f"<p>{written}</p>")


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "PATH", "monkey", "max_new_tokens", "tokenizer", "KEYS", "repeat"])
def test_names_of_other_things_are_none(name: str) -> None:
    assert not names_secret(name)


def test_code_and_pages_stay_as_they_are_but_for_secrets() -> None:
    code = (
        "rows = sorted(rows, key=len)\nauth = make(token=self.token)\nplot(key=e.key);\nfor key, sig in pairs: pass\n"
    )
    assert file_without_secrets(code) == code
    page = "<p>&quot;https://host/a?x=1&amp;sig=S3CRET&quot; is a URL, password=&#34;S3CRET&#34;</p>"
    assert file_without_secrets(page) == "<p>&quot;https://host/a?***&quot; is a URL, password=&#34;***&#34;</p>"
    assert file_without_secrets('token = "S3CRET"') == 'token = "***"'


def test_a_long_text_takes_no_time() -> None:
    text = "abcdef0123" * 200_000
    assert file_without_secrets(text) == text


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("https://me:pass@host/x", "a password"),
        ("https://host/x?part=1&X-Goog-Signature=a", "a signature"),
        ("https://host/x?sv=1&sig=a", "a signature"),
        ("s3://bucket/x?versionId=3", None),
        ("s3://bucket/x", None),
        ("data/what?key=1", None),
    ],
)
def test_urls_that_hold_a_secret(url: str, secret: str | None) -> None:
    assert url_holds_secret(url) == secret
