"""${message}

Say here whether old code can go on with the new schema (an expanding
migration) or not: then the first thing that it does is raise
taskstore_head.schema_epoch.  On MariaDB each statement commits by itself, so
that this comes before the rest, and everything here has to bear repetition.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
