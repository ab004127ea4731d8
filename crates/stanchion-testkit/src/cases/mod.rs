//! The cases, by subject. Each is a function named after the behaviour; [`for_every_case`](crate::for_every_case) lists
//! them all, once.
#![allow(missing_docs, reason = "a case's name says what it is")]

pub mod cancellation;
pub mod concurrency;
pub mod forced;
pub mod handoff;
pub mod holds;
pub mod keys;
pub mod library;
pub mod limits;
pub mod liveness;
pub mod looking;
pub mod messages;
pub mod primitives;
pub mod queue;
pub mod sessions;
pub mod threads;
pub mod time;

/// Calls a macro with every case of the suite.
#[doc(hidden)]
#[macro_export]
macro_rules! for_every_case {
    ($callback:path $(, $with:ident, $fixture:expr)?) => {
        $callback! { $($with, $fixture,)?
            sessions::opening_a_session_again_is_the_same_session,
            sessions::a_beat_of_a_session_that_was_never_opened_is_gone,
            sessions::a_beaten_session_lives_on,
            sessions::a_closed_session_never_lives_again,
            sessions::a_session_that_did_not_beat_is_dead_for_good [Beat],
            sessions::a_session_lives_as_long_as_its_process [Process],
            sessions::closing_a_session_hands_its_keys_on [Push],
            sessions::a_dead_holder_is_followed_by_the_next_who_asks,
            sessions::a_dead_holder_of_many_keys_loses_them_all,
            sessions::dead_waiters_are_skipped_all_at_once,
            sessions::a_fixed_hold_outlives_its_session,
            sessions::a_waiter_for_a_fixed_term_dies_with_its_session,
            sessions::a_fixed_term_that_the_dead_were_granted_keeps_nobody_out,
            sessions::a_fixed_term_that_its_holder_has_seen_outlives_the_session,
            sessions::dead_holder_limits_nobody,
            sessions::many_dead_sessions_do_not_keep_a_key_from_others,
            sessions::others_see_whether_a_session_lives,
            sessions::looking_at_a_session_renews_nothing [Beat],
            sessions::ten_sessions_of_one_process_are_ten_sessions,
            holds::a_free_key_is_granted_and_released,
            holds::three_keys_at_once_are_independent,
            holds::a_held_key_is_busy_also_for_its_holder,
            holds::a_repeated_acquire_returns_the_same_grant,
            holds::a_repeated_release_finds_nothing,
            holds::a_wrong_token_does_nothing,
            holds::an_abandoned_grant_is_gone,
            holds::a_fixed_term_ends_and_another_can_have_the_key,
            holds::a_fixed_term_counts_from_the_grant_not_from_the_question,
            holds::a_session_hold_ends_at_its_max_hold,
            holds::extending_counts_from_now_keeps_the_fence_and_may_shorten,
            holds::extending_never_creates_and_never_revives,
            holds::extending_races_a_contender_at_the_end_and_one_of_them_wins,
            holds::of_two_who_adopt_one_gets_it,
            holds::an_adopted_session_hold_moves_to_the_new_session,
            holds::adopting_nothing_creates_nothing,
            holds::fences_rise_over_every_grant_however_the_last_one_ended,
            holds::fences_of_many_keys_never_repeat_when_they_come_back,
            queue::a_release_hands_the_key_to_the_head_and_tells_it_alone [Push, Fair],
            queue::waiters_are_served_in_the_order_in_which_they_asked [Fair],
            queue::nobody_passes_the_queue [Fair],
            queue::a_repeated_question_of_a_waiter_keeps_its_place [Fair],
            queue::a_waiter_that_gives_up_leaves_no_place [Fair],
            queue::a_grant_that_nobody_collects_is_ended_by_its_token [Fair],
            queue::a_hand_off_starts_a_fixed_term_at_the_grant,
            queue::the_end_of_a_term_serves_the_waiter_when_it_asks,
            queue::a_semaphore_admits_its_capacity_and_no_more [Fair],
            queue::readers_share_and_a_writer_waits_for_those_before_it_alone [Fair],
            queue::a_cooldown_keeps_the_key_closed_and_then_serves_the_waiter,
            queue::a_cooldown_ends_without_a_waiter_too,
            queue::a_full_queue_refuses_and_enters_nothing [Fair],
            queue::a_push_names_key_token_and_fence [Push],
            queue::a_waiter_in_another_process_is_called [Push, Fair],
            limits::exclusive_excludes_readers_and_permits,
            limits::one_queue_serves_every_kind_in_order [Fair],
            limits::smaller_limit_holds_until_its_holders_go,
            limits::raised_limit_counts_once_old_holders_go [Fair],
            limits::lowered_limit_waits_for_old_holders [Fair],
            limits::forced_out_holder_limits_nobody,
            limits::random_limits_agree_with_a_reference [Fair],
            messages::every_answer_tells_a_time_that_does_not_run_back,
            messages::an_acquire_that_comes_too_late_changes_nothing,
            messages::an_acquire_that_comes_after_its_end_is_ended_again,
            messages::a_poll_never_creates,
            messages::poll_answers_tokens_in_their_order [Fair],
            messages::poll_settles_a_key_once_for_all_tokens [Fair],
            messages::poll_of_ended_tokens_answers_gone,
            messages::a_dropped_question_leaves_no_half_step,
            messages::a_forced_release_needs_the_fence_that_is_there,
            messages::a_forced_release_is_told_by_push_and_by_every_beat [Push],
            messages::a_token_that_was_forced_out_is_over,
            messages::one_of_several_permits_can_be_forced_out,
            keys::keys_of_any_content_are_apart_and_read_back_whole,
            keys::a_composed_and_a_decomposed_key_are_the_same,
            keys::an_unknown_key_is_free_and_not_listed,
            keys::what_is_seen_of_holders_and_waiters,
            keys::nothing_that_is_seen_holds_a_token,
            keys::listing_goes_by_prefix_and_page,
            keys::what_has_ended_is_not_listed,
            liveness::a_session_that_ended_by_time_is_not_opened_again [Beat],
            liveness::a_beat_keeps_its_own_session_alone [Beat],
            liveness::asking_is_no_beat [Beat],
            liveness::the_death_of_a_session_leaves_its_fixed_permit,
            liveness::dead_waiter_is_gone_from_a_closed_key,
            liveness::the_end_of_a_session_is_told_to_the_waiter_beforehand [Beat],
            liveness::asking_for_a_session_that_was_never_opened_enters_nothing,
            liveness::closing_a_session_that_is_not_there_is_nothing,
            liveness::a_dead_token_can_do_nothing_any_more,
            liveness::a_dead_head_that_did_not_fit_lets_the_next_in,
            liveness::a_crashed_reader_goes_though_other_readers_stay,
            liveness::a_dead_session_leaves_no_cooldown,
            liveness::a_session_that_is_closed_loses_its_places_in_every_queue [Fair],
            liveness::a_fixed_hold_of_a_dead_session_is_extended_and_ended_by_its_token,
            time::terms_of_any_length_are_kept,
            time::a_max_hold_counts_from_the_grant,
            time::a_max_hold_does_not_outlive_its_session,
            time::a_beat_moves_no_deadline,
            time::a_shorter_term_is_told_to_the_waiter,
            time::a_longer_term_keeps_the_waiter_waiting,
            time::the_first_of_several_deadlines_is_told,
            time::extending_one_permit_leaves_the_others,
            time::extending_a_waiter_does_nothing,
            time::a_term_that_ends_serves_as_many_as_fit [Fair],
            time::a_term_that_ends_closes_nothing,
            time::giving_up_closes_nothing,
            time::a_cooldown_of_a_permit_closes_the_key_and_leaves_the_others,
            time::a_shorter_cooldown_opens_nothing_sooner,
            time::a_cooldown_of_nothing_closes_nothing,
            time::a_closed_key_keeps_its_waiters_in_order [Fair],
            forced::evicting_nothing_changes_nothing,
            forced::everything_that_was_lost_is_told_until_it_is_ended,
            forced::a_forced_release_closes_nothing_and_serves_all_that_fit,
            forced::a_forced_token_is_refused_also_after_hand_offs [Fair],
            forced::a_fixed_term_can_be_forced_out_too,
            forced::a_hold_of_the_dead_can_be_forced_out,
            forced::what_is_over_cannot_be_forced_out,
            forced::an_adopted_hold_keeps_fence_deadline_and_text,
            forced::the_old_token_of_an_adopted_hold_does_nothing,
            forced::a_repeated_adopt_is_answered_the_same_also_late,
            forced::an_adopted_hold_that_is_forced_out_is_told_to_its_new_session,
            forced::a_waiter_cannot_be_adopted,
            forced::what_is_over_cannot_be_adopted,
            handoff::a_hand_off_is_found_by_asking_alone,
            handoff::a_head_that_gives_up_lets_the_next_in [Fair],
            handoff::a_writer_that_gives_up_lets_the_readers_in [Fair],
            handoff::a_stream_of_readers_does_not_starve_a_writer [Fair],
            handoff::one_release_serves_as_many_as_fit_in_order [Fair],
            handoff::a_small_demand_does_not_pass_a_large_one [Fair],
            handoff::an_oversized_mix_never_exceeds_the_capacity,
            handoff::every_way_to_leave_tells_the_next [Push],
            handoff::each_of_several_tokens_of_a_session_is_told [Push],
            handoff::a_waiter_stays_after_its_question_has_become_too_late,
            handoff::a_late_message_of_an_old_token_does_not_touch_the_next_one,
            handoff::a_queue_full_of_the_dead_has_room,
            looking::looking_changes_nothing,
            looking::two_who_look_see_the_same,
            looking::waiters_are_seen_in_order [Fair],
            looking::texts_of_the_full_length_are_kept,
            looking::an_age_grows_and_a_beginning_stays,
            looking::what_is_closed_or_waited_for_is_listed,
            looking::a_prefix_is_taken_letter_by_letter,
            looking::pages_of_any_size_give_every_key_once,
            looking::paging_goes_on_behind_a_key_that_is_gone,
            looking::a_namespace_is_no_prefix_of_a_name,
            looking::a_name_like_an_internal_one_is_a_name,
            looking::a_key_of_the_full_length_does_everything,
            looking::fences_are_in_order_as_text,
            looking::the_fences_of_a_key_do_not_move_with_those_of_another,
            looking::a_second_handle_sees_what_the_first_did,
            threads::of_contenders_in_threads_one_wins_each_round,
            threads::a_semaphore_under_contention_admits_exactly_its_capacity,
            threads::one_question_asked_many_times_at_once_is_one_hold,
            threads::a_token_is_ended_once_however_many_try,
            threads::wrong_tokens_at_once_end_nothing,
            threads::of_many_who_adopt_at_once_one_gets_it,
            threads::waiters_in_threads_never_overlap_and_leave_nothing,
            threads::a_counter_kept_under_the_lock_loses_nothing,
            threads::different_keys_do_not_wait_for_each_other,
            threads::waiters_that_come_and_go_in_threads_leave_nothing,
            threads::sessions_that_end_in_the_middle_leave_nothing,
            concurrency::of_many_contenders_one_wins_each_round,
            concurrency::rapid_cycles_leave_nothing,
            concurrency::random_operations_agree_with_an_oracle [Fair],
            library::a_lock_waits_for_the_one_before_it,
            library::a_wait_has_a_limit,
            library::at_most_the_capacity_is_ever_inside,
            library::a_read_modify_write_under_the_lock_loses_nothing,
            library::a_forced_release_ends_the_running_body,
            library::a_detached_hold_is_taken_up_by_another_handle,
            library::a_fixed_term_is_lost_before_another_can_have_it,
            library::a_cooldown_skips_those_who_come_too_soon,
            library::namespaces_are_apart,
            library::bad_arguments_are_refused_and_leave_nothing,
            primitives::readers_share_and_a_writer_is_alone,
            primitives::permits_are_given_up_to_the_limit,
            primitives::differing_limits_are_told_and_refuse_nobody,
            primitives::several_keys_are_taken_all_or_nothing,
            primitives::a_wait_for_several_keys_has_one_limit_and_keeps_nothing,
            primitives::a_crowd_over_sets_of_keys_neither_dead_locks_nor_leaves_anything,
            primitives::a_crowd_of_readers_does_not_keep_a_writer_waiting [Fair],
            primitives::what_was_run_once_is_not_run_again_for_its_cooldown,
            primitives::a_period_counts_from_the_beginning_and_leaves_a_tenth,
            primitives::a_run_that_fails_does_not_count_unless_it_is_to,
            primitives::who_waits_for_a_run_finds_it_done,
            primitives::a_slot_is_run_once_however_clocks_differ,
            primitives::the_last_run_is_known,
            primitives::a_run_of_the_longest_name_is_recorded,
            primitives::a_leader_resigns_and_the_next_in_line_leads,
            primitives::what_became_of_a_hold_is_told,
            primitives::a_long_job_gives_signs_of_life_and_hears_when_to_stop,
            cancellation::a_call_that_is_dropped_at_any_await_leaves_nothing,
            cancellation::a_wait_that_is_dropped_at_any_await_leaves_nothing [Push],
            cancellation::what_is_made_of_locks_may_be_dropped_at_any_await,
        }
    };
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// Every case in every file is in the list: a case that is not run is no case.
    #[test]
    fn every_case_is_listed() {
        let mut written = BTreeSet::new();
        for file in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/cases")).unwrap() {
            let path = file.unwrap().path();
            let subject = path.file_stem().unwrap().to_str().unwrap().to_owned();
            for line in std::fs::read_to_string(&path).unwrap().lines() {
                if let Some(name) = line.strip_prefix("pub async fn ").and_then(|line| line.split('<').next()) {
                    written.insert(format!("{subject}::{name}"));
                }
            }
        }
        let listed: BTreeSet<_> =
            crate::cases().iter().map(|case| format!("{}::{}", case.subject, case.name)).collect();
        assert_eq!(listed, written);
        assert_eq!(listed.len(), crate::cases().len(), "none is listed twice");
    }
}
