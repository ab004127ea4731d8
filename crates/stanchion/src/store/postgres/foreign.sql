-- Lists the reasons why the schema is unsafe to use, one per row: parts that do not belong to the schema's owner, and
-- foreign code that an operation would run when it reads or writes a table of the schema. The query reads only the
-- catalog, because reading a table or calling a function could run that code.
WITH place AS (
  SELECT n.oid, n.nspowner AS owner, n.nspacl AS acl FROM pg_catalog.pg_namespace n
  WHERE n.oid = pg_catalog.to_regnamespace('@schema@')
), part AS (
  SELECT 'pg_catalog.pg_class'::regclass AS class, c.oid, c.relowner AS owner
  FROM pg_catalog.pg_class c JOIN place ON c.relnamespace = place.oid
  UNION ALL
  SELECT 'pg_catalog.pg_proc'::regclass, p.oid, p.proowner
  FROM pg_catalog.pg_proc p JOIN place ON p.pronamespace = place.oid
  UNION ALL
  SELECT 'pg_catalog.pg_type'::regclass, t.oid, t.typowner
  FROM pg_catalog.pg_type t JOIN place ON t.typnamespace = place.oid
), ours AS (
  SELECT c.oid, c.relowner AS owner, c.relacl AS acl,
    c.relkind = 'r' AND c.relpersistence = 'p' AND c.reloftype = 0 AND NOT c.relispartition
      AND NOT c.relrowsecurity AND NOT c.relforcerowsecurity AS is_plain
  FROM pg_catalog.pg_class c JOIN place ON c.relnamespace = place.oid
  WHERE c.relname IN ('meta', 'sessions', 'keys', 'holds', 'queue', 'forced')
), strange (class, oid, why) AS (
  SELECT part.class, part.oid, 'belongs to ' || pg_catalog.pg_get_userbyid(part.owner)
    || ', the schema to ' || pg_catalog.pg_get_userbyid(place.owner)
  FROM part, place WHERE part.owner <> place.owner
  UNION ALL
  SELECT 'pg_catalog.pg_class'::regclass, ours.oid, 'is not a plain table' FROM ours WHERE NOT ours.is_plain
  UNION ALL
  SELECT found.class, found.oid, found.why FROM ours, LATERAL (
    SELECT 'pg_catalog.pg_class'::regclass AS class, ours.oid, 'has a parent or a child' AS why
    FROM pg_catalog.pg_inherits i WHERE i.inhrelid = ours.oid OR i.inhparent = ours.oid
    UNION ALL
    SELECT 'pg_catalog.pg_trigger'::regclass, t.oid, 'is not ours' FROM pg_catalog.pg_trigger t WHERE t.tgrelid = ours.oid
    UNION ALL
    SELECT 'pg_catalog.pg_rewrite'::regclass, r.oid, 'is not ours' FROM pg_catalog.pg_rewrite r WHERE r.ev_class = ours.oid
    UNION ALL
    SELECT 'pg_catalog.pg_attrdef'::regclass, d.oid, 'is not ours' FROM pg_catalog.pg_attrdef d
    WHERE d.adrelid = ours.oid AND pg_catalog.replace(pg_catalog.pg_get_expr(d.adbin, d.adrelid), 'pg_catalog.', '')
      NOT IN ('true', 'false', '0', '''''::text', 'gen_random_uuid()', 'uuid_send(gen_random_uuid())')
    UNION ALL
    SELECT 'pg_catalog.pg_constraint'::regclass, c.oid, 'is not ours' FROM pg_catalog.pg_constraint c
    WHERE c.conrelid = ours.oid AND c.contype NOT IN ('p', 'n') AND pg_catalog.pg_get_constraintdef(c.oid) <> 'CHECK (one)'
    UNION ALL
    SELECT 'pg_catalog.pg_class'::regclass, i.indexrelid, 'calls functions' FROM pg_catalog.pg_index i
    WHERE i.indrelid = ours.oid AND (i.indexprs IS NOT NULL OR i.indpred IS NOT NULL)
    -- `OFFSET 0` keeps the planner from joining earlier: these functions are slow, and the catalog of a large database
    -- is long.
    OFFSET 0
  ) found
  UNION ALL
  -- The server records on which objects a column or an index depends, for example a domain or an operator class, unless
  -- the object is built in.
  SELECT d.refclassid, d.refobjid, 'is used by ' || pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid)
  FROM pg_catalog.pg_depend d
  WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.deptype = 'n'
    AND d.refclassid NOT IN ('pg_catalog.pg_namespace'::regclass, 'pg_catalog.pg_class'::regclass,
      'pg_catalog.pg_am'::regclass)
    AND d.objid IN (SELECT ours.oid FROM ours UNION ALL
      SELECT i.indexrelid FROM pg_catalog.pg_index i JOIN ours ON i.indrelid = ours.oid)
  UNION ALL
  -- A function that runs with its owner's rights is safe only with a fixed path. Any other function would run with the
  -- rights of its caller.
  SELECT 'pg_catalog.pg_proc'::regclass, p.oid, 'does not run with its owner''s rights and a fixed search_path'
  FROM pg_catalog.pg_proc p JOIN place ON p.pronamespace = place.oid
  WHERE p.proname IN ('version', 'open_session', 'renew_session', 'close_session', 'session_lives', 'acquire', 'poll', 'poll_many', 'finish',
      'together', 'extend', 'linger', 'adopt', 'force_release', 'inspect', 'list_page', 'tidy', 'check_fence')
    AND NOT (p.prosecdef AND 'search_path=pg_catalog, pg_temp' = ANY (coalesce(p.proconfig, '{}')))
  UNION ALL
  SELECT 'pg_catalog.pg_namespace'::regclass, place.oid, 'lets others than its owner create: REVOKE CREATE ON SCHEMA'
  FROM place
  WHERE EXISTS (SELECT FROM pg_catalog.aclexplode(place.acl) a WHERE a.privilege_type = 'CREATE' AND a.grantee <> place.owner)
  UNION ALL
  SELECT 'pg_catalog.pg_class'::regclass, ours.oid,
    'lets others than its owner add triggers or references: REVOKE TRIGGER, REFERENCES ON ALL TABLES IN SCHEMA'
  FROM ours
  WHERE EXISTS (SELECT FROM pg_catalog.aclexplode(ours.acl) a
    WHERE a.privilege_type IN ('TRIGGER', 'REFERENCES') AND a.grantee <> ours.owner)
)
SELECT coalesce(pg_catalog.pg_describe_object(strange.class, strange.oid, 0), 'something') || ' ' || strange.why AS wrong
FROM strange
