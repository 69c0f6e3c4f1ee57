"""Causes and remedies of errors of filesystems and S3 servers, in words."""

from __future__ import annotations

import errno
import os
import re
import ssl
from typing import Any

from datm_ray.words import one_line

_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")
_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile of AWS_PROFILE"
_NOTHING_LOST = "and run the same command again; nothing finished is lost"

_CODES: dict[str, tuple[str, str]] = {
    "NoSuchBucket": ("The bucket does not exist", "Check its spelling and AWS_ENDPOINT_URL, or create it"),
    "InvalidBucketName": ("This is no valid name for a bucket", "Check its spelling"),
    "InvalidAccessKeyId": ("The server does not know this access key", f"Check {_KEYS}, and AWS_ENDPOINT_URL"),
    "SignatureDoesNotMatch": ("The secret key is not that of the access key", f"Check {_KEYS}"),
    "ExpiredToken": ("The session token has expired", f"Get new credentials {_NOTHING_LOST}"),
    "InvalidToken": ("The session token is not valid", "Check AWS_SESSION_TOKEN, or unset it if the keys need none"),
    "RequestTimeTooSkewed": ("The clocks of this machine and of the server differ too much", "Set this clock"),
    "AuthorizationHeaderMalformed": ("The bucket is in another region", "Set AWS_DEFAULT_REGION to its region"),
    "QuotaExceeded": (
        "The quota of the bucket or its user is used up",
        f"Raise it or free some space, {_NOTHING_LOST}",
    ),
    "EntityTooLarge": ("The server takes no file of this size", "Raise its limit, or give a local --store"),
    "NotImplemented": ("The server does not support a part of this request", "Update it, or give another server"),
}
"""S3 error code -> cause and remedy, as texts for messages."""

for _code, _same in {
    "404": "NoSuchBucket",
    "AccessDeniedInvalidKey": "InvalidAccessKeyId",
    "TokenRefreshRequired": "ExpiredToken",
    "301": "AuthorizationHeaderMalformed",
    "PermanentRedirect": "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException": "AuthorizationHeaderMalformed",
    "XMinioStorageFull": "QuotaExceeded",
    "InsufficientCapacity": "QuotaExceeded",
    "507": "QuotaExceeded",
    "413": "EntityTooLarge",
    "501": "NotImplemented",
}.items():
    _CODES[_code] = _CODES[_same]

_FOR_GOOD = (
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG),
)
"""Numbers of filesystem errors that every further attempt would repeat. Errors of a full or read-only disk are left
out, because another machine may succeed."""

_PERMISSIONS = {
    "list": "s3:ListBucket on the bucket",
    "write": "s3:PutObject on its objects",
    "delete": "s3:DeleteObject on its objects",
}
_LOOKING = "s3:GetObject on its objects, and s3:ListBucket on the bucket, without which a missing file is denied too"


def cause_and_remedy(error: Exception, action: str) -> tuple[str, str]:
    """Likely cause of an error of a filesystem or S3 server, and what to do about it ("" if unknown).

    Args:
        action: verb of the failed operation: "look for", "list", "read", "write", "delete", "clean" or "open".
    """
    names, code = {kind.__name__ for kind in type(error).__mro__}, code_of(error)
    if code in _CODES and (code != "404" or lacks_bucket(error)):
        return _CODES[code]
    if isinstance(error, FileNotFoundError):
        return "The file, its folder or its bucket does not exist", "Check the spelling"
    if isinstance(error, IsADirectoryError):
        return reason(error), "Give the path of a file in it" if action == "read" else ""
    if isinstance(error, PermissionError) and code:
        needed = _PERMISSIONS.get(action, _LOOKING)
        return (
            f"Access is denied ({_code_and_message(error)})",
            f"If the bucket is yours, allow this user {needed}; if not, check its spelling",
        )
    if isinstance(error, PermissionError):
        return f"Access is denied ({reason(error)})", "Check the owner of the folder, or the credentials"
    if "SSLError" in names:
        return _of_tls(error)
    if "ProxyConnectionError" in names:
        return (
            f"The proxy of http_proxy or https_proxy does not answer ({reason(error)})",
            "Check that variable, or add the server's host to no_proxy",
        )
    if lacks_certificates(error):
        return (
            f"The certificates to trust cannot be read ({reason(error)})",
            f"AWS_CA_BUNDLE is {os.environ.get('AWS_CA_BUNDLE', 'not set')!r}: give an existing file",
        )
    if names & {"ResponseParserError"} or (status_of(error) >= 400 and (code == "" or code.isdigit())):
        return (
            f"The answer is not an S3 server's ({f'HTTP {status_of(error)}' if status_of(error) else reason(error)})",
            "Check host, port and http or https of AWS_ENDPOINT_URL, and the proxy or gateway before it",
        )
    if names & {"HTTPClientError", "ConnectionError"}:
        return f"The server does not answer ({reason(error)})", "Check the network and AWS_ENDPOINT_URL"
    if names & {"NoCredentialsError", "PartialCredentialsError"}:
        return "No credentials were found", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if "CredentialRetrievalError" in names:
        return (
            f"The credentials could not be fetched ({reason(error)})",
            "Check the role that hands them out; AWS_METADATA_SERVICE_NUM_ATTEMPTS=5 has a machine asked more often",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return reason(error), "Free some space and start again; nothing finished is lost"
    return reason(error), ""


def _of_tls(error: Exception) -> tuple[str, str]:
    if refused := re.search(r"certificate verify failed: ([^(\]]+)", str(error)):
        return (
            f"The server's certificate is not trusted ({refused[1].strip()})",
            "Set AWS_CA_BUNDLE to the file with the certificate of the authority that signed it",
        )
    return (
        f"No secure connection to the server ({reason(error)})",
        "Check whether AWS_ENDPOINT_URL should begin with http://; AWS_CA_BUNDLE names the certificates to trust",
    )


def lacks_certificates(error: Exception) -> bool:
    """True if a request failed because the file of trusted certificates is missing or invalid."""
    inner = getattr(error, "kwargs", {}).get("error")
    return isinstance(inner, (FileNotFoundError, PermissionError, IsADirectoryError, ssl.SSLError))


def code_of(error: BaseException | None) -> str:
    """Error code in an S3 server's answer, such as "NoSuchBucket"; "" if there is none."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def status_of(error: BaseException | None) -> int:
    """HTTP status of a server's answer; 0 if there is none."""
    return int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _answer(error: BaseException | None) -> dict[str, dict[str, Any]]:
    """Server's answer as botocore has parsed it; {} if there is none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response
        error = error.__cause__ or error.__context__
    return {}


def lacks_bucket(error: Exception) -> bool:
    """True if S3 reported a missing bucket, not a missing file. s3fs raises the same exception for both."""
    return code_of(error) in ("NoSuchBucket", "404")


def may_pass(error: Exception) -> bool:
    """True if a failed file operation may succeed later or on another machine; False if, say, access was denied."""
    return isinstance(error, OSError) and error.errno not in _FOR_GOOD


def is_beyond_the_end(error: Exception) -> bool:
    """True if a range was requested that begins after the end of the file."""
    return status_of(error) == 416 or code_of(error) == "InvalidRange"


def reason(error: Exception) -> str:
    """Text of an error, on one line and without credentials."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    words = "" if words == "None" else words  # some servers send no message
    return without_credentials(" ".join(words.split())) or code_of(error) or type(error).__name__


def _code_and_message(error: Exception) -> str:
    """S3 error code in a server's answer, followed by the server's message if that adds information."""
    code, words = code_of(error), str(_answer(error).get("Error", {}).get("Message") or "")
    return code if words.replace(" ", "") in ("", code, "Forbidden") else f"{code}: {one_line(words)}"


def without_credentials(text: str) -> str:
    """The text without the credentials in its URIs, which are the part between "://" and "@"."""
    return _CREDENTIALS.sub("", text)
