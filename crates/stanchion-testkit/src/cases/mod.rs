//! Defines the cases of the suite, one module per subject.
//!
//! Each case is a function named after the behaviour. [`for_every_case`](crate::for_every_case) lists every case once.
#![allow(missing_docs, reason = "the name of a case describes it")]

pub mod adoption;
pub mod cancellation;
pub mod concurrency;
pub mod differential;
pub mod force_release;
pub mod handoff;
pub mod holds;
pub mod inspection;
pub mod keys;
pub mod library;
pub mod limits;
pub mod lingering;
pub mod liveness;
pub mod local_grants;
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
            sessions::reopening_keeps_the_session,
            sessions::renewing_unknown_session_answers_gone,
            sessions::renewed_session_stays_alive,
            sessions::closed_session_cannot_reopen,
            sessions::unrenewed_session_expires_for_good [Beat],
            sessions::session_lives_as_long_as_its_process [Process],
            sessions::closing_session_hands_off_its_keys [Push],
            sessions::next_waiter_replaces_dead_holder,
            sessions::dead_holder_loses_all_its_keys,
            sessions::one_release_skips_all_dead_waiters,
            sessions::fixed_hold_outlives_its_session,
            sessions::fixed_waiter_ends_with_its_session,
            sessions::fixed_grant_to_dead_waiter_blocks_nobody,
            sessions::polled_fixed_grant_outlives_its_session,
            sessions::dead_holder_limits_nobody,
            sessions::many_dead_sessions_block_nobody,
            sessions::other_clients_see_session_liveness,
            sessions::querying_session_does_not_renew_it [Beat],
            sessions::sessions_of_one_process_are_independent,
            holds::free_key_is_granted_and_released,
            holds::held_keys_are_independent,
            holds::held_key_is_busy_even_for_its_holder,
            holds::repeated_acquire_returns_same_grant,
            holds::repeated_release_finds_nothing,
            holds::wrong_token_changes_nothing,
            holds::abandon_releases_the_grant,
            holds::expired_fixed_hold_frees_the_key,
            holds::repeated_acquire_moves_no_deadline,
            holds::session_hold_ends_at_max_hold,
            holds::extend_sets_deadline_and_keeps_fence,
            holds::extend_never_creates_or_revives,
            holds::extend_or_contender_wins_at_expiry,
            holds::fences_rise_however_holds_end,
            holds::reused_keys_never_repeat_fences,
            adoption::concurrent_adopt_has_one_winner,
            adoption::adopt_moves_hold_to_new_session,
            adoption::failed_adopt_changes_nothing,
            adoption::adopted_hold_keeps_fence_and_deadline,
            adoption::old_token_after_adopt_changes_nothing,
            adoption::repeated_adopt_returns_same_grant,
            adoption::new_session_learns_of_force_release,
            adoption::waiter_cannot_be_adopted,
            adoption::ended_hold_cannot_be_adopted,
            force_release::force_release_needs_the_current_fence,
            force_release::force_release_is_pushed_and_in_renewals [Push],
            force_release::force_released_token_is_gone,
            force_release::one_permit_can_be_force_released,
            force_release::failed_force_release_changes_nothing,
            force_release::renewals_report_losses_until_released,
            force_release::force_release_serves_fitting_waiters,
            force_release::force_released_token_stays_rejected [Fair],
            force_release::fixed_hold_can_be_force_released,
            force_release::hold_of_dead_session_can_be_force_released,
            force_release::ended_hold_cannot_be_force_released,
            queue::release_grants_and_notifies_only_the_head [Push, Fair],
            queue::waiters_are_served_in_order [Fair],
            queue::new_request_cannot_pass_the_queue [Fair],
            queue::repeated_acquire_keeps_queue_place [Fair],
            queue::abandoned_waiter_leaves_the_queue [Fair],
            queue::abandon_ends_uncollected_grant [Fair],
            queue::fixed_ttl_starts_at_handoff,
            queue::poll_after_expiry_grants_the_waiter,
            queue::semaphore_never_exceeds_capacity [Fair],
            queue::writer_waits_only_for_earlier_readers [Fair],
            queue::cooldown_delays_the_next_grant,
            queue::cooldown_ends_without_a_waiter,
            queue::full_queue_rejects_requests [Fair],
            queue::push_names_key_token_and_fence [Push],
            queue::waiter_in_other_process_is_notified [Push, Fair],
            limits::exclusive_excludes_readers_and_permits,
            limits::one_queue_serves_every_kind_in_order [Fair],
            limits::smaller_limit_applies_until_release,
            limits::raised_limit_applies_after_old_holders [Fair],
            limits::lowered_limit_waits_for_old_holders [Fair],
            limits::force_released_holder_limits_nobody,
            limits::random_limits_match_the_reference [Fair],
            differential::random_operations_match_memory [Push, Fair],
            messages::reply_times_never_decrease,
            messages::late_acquire_changes_nothing,
            messages::acquire_after_abandon_can_be_abandoned,
            messages::poll_never_creates,
            messages::poll_answers_in_token_order [Fair],
            messages::poll_reconciles_a_key_once [Fair],
            messages::poll_of_ended_tokens_answers_gone,
            messages::dropped_acquire_can_be_abandoned,
            keys::keys_of_any_content_stay_distinct,
            keys::composed_and_decomposed_keys_are_equal,
            keys::unknown_key_is_free_and_not_listed,
            keys::inspect_shows_holders_and_waiters,
            keys::inspect_shows_no_token,
            keys::list_selects_by_prefix_and_page,
            keys::ended_holds_are_not_listed,
            liveness::expired_session_cannot_reopen [Beat],
            liveness::renewal_keeps_only_its_own_session [Beat],
            liveness::requests_do_not_renew_session [Beat],
            liveness::dead_session_leaves_its_fixed_permit,
            liveness::dead_waiter_leaves_a_closed_key,
            liveness::waiter_learns_session_deadline [Beat],
            liveness::unknown_session_cannot_acquire,
            liveness::closing_unknown_session_changes_nothing,
            liveness::token_of_closed_session_changes_nothing,
            liveness::dead_head_lets_next_waiter_in,
            liveness::dead_reader_leaves_other_readers,
            liveness::dead_session_leaves_no_cooldown,
            liveness::closed_session_leaves_every_queue [Fair],
            liveness::token_controls_fixed_hold_after_death,
            time::lifetimes_of_any_length_are_kept,
            time::max_hold_counts_from_the_grant,
            time::max_hold_ends_with_its_session,
            time::renewal_moves_no_deadline,
            time::waiter_learns_shortened_deadline,
            time::extended_hold_keeps_waiter_waiting,
            time::waiter_learns_earliest_deadline,
            time::extend_moves_only_its_own_permit,
            time::extend_ignores_a_waiter,
            time::expiry_serves_fitting_waiters [Fair],
            time::expired_hold_starts_no_cooldown,
            time::abandon_starts_no_cooldown,
            time::permit_cooldown_leaves_other_permits,
            time::shorter_cooldown_never_opens_sooner,
            time::zero_cooldown_closes_nothing,
            time::closed_key_keeps_waiters_in_order [Fair],
            handoff::poll_finds_handoff_without_push,
            handoff::abandoning_head_lets_next_waiter_in [Fair],
            handoff::abandoning_writer_lets_readers_in [Fair],
            handoff::reader_stream_never_starves_a_writer [Fair],
            handoff::release_serves_fitting_waiters_in_order [Fair],
            handoff::small_demand_cannot_pass_a_large_one [Fair],
            handoff::mixed_demands_never_exceed_capacity,
            handoff::every_kind_of_release_notifies_next [Push],
            handoff::push_reaches_each_token_of_a_session [Push],
            handoff::waiter_outlives_its_request_deadline,
            handoff::late_messages_spare_the_next_token,
            handoff::full_queue_of_dead_waiters_has_room,
            lingering::linger_answers_fences_up_to_the_clock [Push],
            lingering::next_grant_is_above_the_reserved_fences [Push],
            lingering::waiter_behind_lingering_hold_is_granted [Push],
            lingering::hold_with_a_waiter_cannot_linger [Push],
            lingering::linger_never_creates,
            lingering::only_exclusive_session_holds_can_linger [Push],
            lingering::lingering_hold_keeps_its_grant [Push],
            lingering::waiter_recalls_lingering_hold [Push],
            lingering::head_recalls_again_with_each_poll [Push],
            lingering::only_lingering_holders_are_recalled [Push],
            lingering::busy_answer_names_lingering_hold [Push],
            lingering::adopted_lingering_hold_gets_a_new_fence [Push],
            lingering::force_release_names_the_stored_fence [Push],
            lingering::lingering_hold_is_shown [Push],
            lingering::lingering_hold_ends_with_its_session [Push],
            local_grants::lingering_key_is_granted_without_requests [Push],
            local_grants::local_fences_rise_below_the_next_store_grant [Push],
            local_grants::unused_key_goes_to_the_next_process [Push],
            local_grants::used_key_goes_to_the_next_process_later [Push],
            local_grants::calls_of_a_process_hand_the_key_over [Push],
            local_grants::calls_before_the_first_grant_share_it [Push],
            local_grants::abandoned_turns_go_to_the_next_call [Push],
            local_grants::calls_after_a_recall_wait_behind_others [Push],
            local_grants::key_used_once_does_not_linger [Push],
            local_grants::unused_key_is_free_after_its_time [Push],
            local_grants::lost_recall_delays_others_by_one_linger [Push],
            local_grants::attempt_recalls_an_unused_key [Push],
            local_grants::lost_session_ends_lingering_keys [Push, Beat],
            local_grants::draining_releases_lingering_keys [Push],
            local_grants::closing_releases_lingering_keys [Push],
            local_grants::forced_release_ends_a_lingering_key [Push],
            local_grants::forced_release_ends_a_local_grant [Push],
            local_grants::detached_local_grant_is_not_recalled [Push],
            local_grants::cooldown_ends_a_lingering_key [Push],
            local_grants::token_releases_a_lingering_key [Push],
            local_grants::guard_can_forbid_to_linger [Push],
            local_grants::unsuitable_requests_cannot_linger [Push],
            local_grants::handle_default_lets_keys_linger [Push],
            local_grants::contested_keys_stop_lingering [Push],
            local_grants::failed_request_fails_waiting_calls [Push],
            local_grants::late_answer_revives_nothing [Push],
            local_grants::random_local_grants_pass_the_history_check [Push],
            inspection::inspect_and_list_change_nothing,
            inspection::observers_see_the_same_state,
            inspection::inspect_lists_waiters_in_order [Fair],
            inspection::longest_texts_are_kept,
            inspection::age_grows_and_since_stays,
            inspection::closed_keys_are_listed,
            inspection::prefix_is_matched_literally,
            inspection::pages_return_every_key_once,
            inspection::empty_pages_lead_to_the_next,
            inspection::paging_survives_concurrent_changes,
            inspection::list_omits_ended_holds_and_waiters,
            inspection::namespaces_and_names_never_mix,
            inspection::internal_looking_names_are_plain_keys,
            inspection::longest_key_supports_every_operation,
            inspection::fence_text_sorts_like_fences,
            inspection::fences_of_keys_are_independent,
            inspection::second_handle_sees_changes_at_once,
            threads::contending_threads_have_one_winner,
            threads::contended_semaphore_fills_its_capacity,
            threads::concurrent_repeats_are_one_hold,
            threads::concurrent_ends_release_a_token_once,
            threads::concurrent_wrong_tokens_end_nothing,
            threads::adopting_threads_have_one_winner,
            threads::waiting_threads_never_overlap,
            threads::locked_counter_loses_no_increment,
            threads::different_keys_never_block_each_other,
            threads::abandoning_threads_leave_nothing,
            threads::sessions_closed_midway_leave_nothing,
            concurrency::contending_tasks_have_one_winner,
            concurrency::rapid_cycles_leave_nothing,
            concurrency::random_operations_match_an_oracle [Fair],
            library::lock_waits_for_earlier_holder,
            library::wait_limit_ends_the_wait,
            library::permits_never_exceed_capacity,
            library::run_makes_read_modify_write_atomic,
            library::force_release_ends_running_body,
            library::other_handle_adopts_detached_hold,
            library::fixed_hold_is_lost_before_key_is_free,
            library::cooldown_rejects_early_requests,
            library::namespaces_are_isolated,
            library::invalid_arguments_are_rejected,
            primitives::readers_share_and_writer_excludes,
            primitives::permits_are_granted_up_to_the_limit,
            primitives::differing_limits_are_reported,
            primitives::lock_all_takes_all_keys_or_none,
            primitives::lock_all_has_one_wait_limit,
            primitives::crowd_on_key_sets_never_deadlocks,
            primitives::crowd_of_readers_never_starves_writers [Fair],
            primitives::once_skips_runs_during_cooldown,
            primitives::period_counts_from_run_start,
            primitives::failed_run_counts_only_on_request,
            primitives::waiting_once_sees_finished_run,
            primitives::slot_runs_once_despite_clock_skew,
            primitives::last_run_is_recorded,
            primitives::run_of_longest_key_is_recorded,
            primitives::runs_are_listed_by_prefix,
            primitives::forgotten_run_runs_again,
            primitives::forced_run_ignores_the_record,
            primitives::next_candidate_leads_after_resign,
            primitives::status_reports_fate_of_a_hold,
            primitives::long_job_stops_on_loss_and_drain,
            cancellation::dropped_calls_leave_nothing,
            cancellation::dropped_waits_leave_nothing [Push],
            cancellation::dropped_primitives_leave_nothing,
        }
    };
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// The list has every case of every file, because a case that is not listed never runs.
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
        assert_eq!(listed.len(), crate::cases().len(), "a case is listed twice");
    }
}
