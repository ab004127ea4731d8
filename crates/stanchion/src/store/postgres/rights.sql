-- The rights of those who use locks, and no others: `@role@` may take the steps and see nothing else. Whoever applies the
-- schema owns it and gives them.
GRANT USAGE ON SCHEMA @schema@ TO @role@;
GRANT EXECUTE ON FUNCTION @schema@.version, @schema@.open_session, @schema@.renew_session, @schema@.close_session,
  @schema@.session_lives, @schema@.acquire, @schema@.poll, @schema@.poll_many, @schema@.finish, @schema@.together,
  @schema@.extend, @schema@.adopt, @schema@.force_release, @schema@.inspect, @schema@.list_page, @schema@.tidy, @schema@.check_fence TO @role@;
