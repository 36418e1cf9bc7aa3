"""What boto3 raises where its ordinary chain (environment, profile, role of the machine) gives no credentials.

S3, KMS and EC2 each say in their own words what lacks them. A profile that is signed out of SSO is one more of these.
"""

from __future__ import annotations

from botocore.exceptions import (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)

NO_CREDENTIALS = (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
