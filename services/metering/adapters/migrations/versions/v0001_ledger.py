"""The ledger."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Written out: a migration stays as it was when the tables of the code change.
_STATEMENTS = (
    """
    CREATE TABLE tenants (
      id text COLLATE "C" PRIMARY KEY, display_name text NOT NULL,
      requests_per_minute bigint, tokens_per_minute bigint, concurrency bigint,
      create_time double precision NOT NULL, request_id text NOT NULL
    )
    """,
    """
    CREATE TABLE projects (
      tenant_id text COLLATE "C" NOT NULL REFERENCES tenants (id), id text COLLATE "C" NOT NULL, display_name text NOT NULL,
      requests_per_minute bigint, tokens_per_minute bigint, concurrency bigint,
      create_time double precision NOT NULL, request_id text NOT NULL,
      PRIMARY KEY (tenant_id, id)
    )
    """,
    """
    CREATE TABLE keys (
      id text COLLATE "C" PRIMARY KEY, sha256 bytea NOT NULL UNIQUE,
      tenant_id text COLLATE "C" NOT NULL, project_id text COLLATE "C" NOT NULL, display_name text NOT NULL,
      secret_hint text NOT NULL, scopes text NOT NULL, allowed_models text NOT NULL,
      requests_per_minute bigint, tokens_per_minute bigint, concurrency bigint,
      create_time double precision NOT NULL, expire_time double precision, revoke_time double precision,
      cache_namespace text NOT NULL,
      FOREIGN KEY (tenant_id, project_id) REFERENCES projects (tenant_id, id)
    )
    """,
    "CREATE INDEX keys_by_tenant ON keys (tenant_id, id)",
    """
    CREATE TABLE accounts (
      name text COLLATE "C" PRIMARY KEY, budget bigint, spent bigint NOT NULL DEFAULT 0, held bigint NOT NULL DEFAULT 0
    ) WITH (fillfactor = 50)
    """,
    """
    CREATE TABLE holds (
      id text COLLATE "C" PRIMARY KEY, operation_id text COLLATE "C" NOT NULL UNIQUE,
      tenant_id text COLLATE "C" NOT NULL, project_id text COLLATE "C" NOT NULL, key_id text COLLATE "C" NOT NULL,
      amount bigint NOT NULL, state text NOT NULL, expire_time double precision NOT NULL,
      budget_before bigint, budget_level text NOT NULL
    )
    """,
    "CREATE INDEX open_holds ON holds (expire_time) WHERE state = 'open'",
    """
    CREATE TABLE leases (
      id text COLLATE "C" PRIMARY KEY,
      tenant_id text COLLATE "C" NOT NULL, project_id text COLLATE "C" NOT NULL, key_id text COLLATE "C" NOT NULL,
      outstanding bigint NOT NULL, expire_time double precision NOT NULL, posted bigint NOT NULL
    )
    """,
    "CREATE INDEX leases_by_expiry ON leases (expire_time)",
    """
    CREATE TABLE journal (
      sequence bigint PRIMARY KEY, attempt_id text COLLATE "C" NOT NULL UNIQUE, operation_id text COLLATE "C" NOT NULL,
      debit text NOT NULL, credit text NOT NULL, amount bigint NOT NULL CHECK (amount >= 0),
      tenant_id text COLLATE "C" NOT NULL, project_id text COLLATE "C" NOT NULL, key_id text COLLATE "C" NOT NULL,
      model text NOT NULL, provider text NOT NULL,
      input_tokens bigint NOT NULL, cached_tokens bigint NOT NULL, cache_write_tokens bigint NOT NULL,
      output_tokens bigint NOT NULL, reasoning_tokens bigint NOT NULL, images bigint NOT NULL, usage_source integer NOT NULL,
      price_version text NOT NULL, start_micros bigint NOT NULL, duration_micros bigint NOT NULL, outcome integer NOT NULL,
      error_reason integer NOT NULL, task_type integer NOT NULL, saved bigint NOT NULL, cache_status integer NOT NULL,
      attempt_number bigint NOT NULL, flags text NOT NULL, post_micros bigint NOT NULL, hash bytea NOT NULL
    )
    """,
    "CREATE INDEX journal_by_tenant ON journal (tenant_id, start_micros)",
    """
    CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'the journal is append-only' USING ERRCODE = 'integrity_constraint_violation'; END $$
    """,
    """
    CREATE TRIGGER journal_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON journal
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
    """,
)


def upgrade() -> None:
    """Brings the schema up."""
    for statement in _STATEMENTS:
        op.execute(statement)
