"""The tables of state.db. Migrations only ever add: an agent that was rolled back works on what its successor left."""

MIGRATIONS = (
    """
    CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE jobs (
        job_id TEXT NOT NULL, execution_number INTEGER NOT NULL, record TEXT NOT NULL,
        finished INTEGER NOT NULL DEFAULT 0, updated_at REAL NOT NULL,
        PRIMARY KEY (job_id, execution_number)
    ) STRICT;
    CREATE TABLE outbox (
        id INTEGER PRIMARY KEY AUTOINCREMENT, priority INTEGER NOT NULL, topic TEXT NOT NULL,
        payload BLOB NOT NULL, created_at REAL NOT NULL, boot_id TEXT NOT NULL, uptime REAL NOT NULL
    ) STRICT;
    CREATE INDEX outbox_order ON outbox (priority, id);
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
        detail TEXT NOT NULL
    ) STRICT;
    """,
    """
    ALTER TABLE outbox ADD COLUMN clock_believed INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE outbox ADD COLUMN losses INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE outbox ADD COLUMN failures INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE outbox ADD COLUMN wait_s REAL NOT NULL DEFAULT 0;
    ALTER TABLE outbox ADD COLUMN wait_boot_id TEXT NOT NULL DEFAULT '';
    ALTER TABLE outbox ADD COLUMN wait_from REAL NOT NULL DEFAULT 0;
    ALTER TABLE outbox ADD COLUMN disk_bytes INTEGER AS (length(payload) + length(topic) + 160);
    CREATE INDEX outbox_size ON outbox (priority, disk_bytes);
    CREATE INDEX outbox_backlog ON outbox (priority, losses, id);
    """,
)
