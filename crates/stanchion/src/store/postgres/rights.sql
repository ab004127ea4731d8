-- The owner of the schema grants these rights to a role that uses locks. `@role@` may call the operations, and can read
-- no table.
GRANT USAGE ON SCHEMA @schema@ TO @role@;
GRANT EXECUTE ON FUNCTION @schema@.version, @schema@.open_session, @schema@.renew_session, @schema@.close_session,
  @schema@.session_lives, @schema@.acquire, @schema@.poll, @schema@.poll_many, @schema@.finish, @schema@.together,
  @schema@.extend, @schema@.linger, @schema@.adopt, @schema@.force_release, @schema@.inspect, @schema@.list_page,
  @schema@.tidy, @schema@.check_fence TO @role@;
