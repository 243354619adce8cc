//! Every way money moves. Amounts are planck.

use codec::Encode;
use frame_support::{
    dispatch::DispatchResult,
    traits::{
        Get,
        fungible::{Inspect, Mutate, MutateHold},
        tokens::{DepositConsequence, Fortitude, Precision, Preservation, Provenance, Restriction},
    },
};
use sp_runtime::{
    ArithmeticError, DispatchError,
    traits::{BlakeTwo256, Hash},
};

use crate::{AccountId, Balance, Config, Event, HoldReason, Pallet, RecoveryReason, Run, RunId};

impl<T: Config> Pallet<T> {
    /// The account that holds a run's escrow: nobody has its key.
    ///
    /// A digest of the whole id. A truncated one, as `PalletId` makes, would let somebody choose
    /// an id whose pot is another run's.
    pub(crate) fn pot_account(run_id: &RunId) -> AccountId {
        AccountId::new(BlakeTwo256::hash_of(&(b"manyhands/run-pot/1", run_id).encode()).0)
    }

    pub(crate) fn hold(reason: HoldReason, who: &AccountId, amount: Balance) -> DispatchResult {
        T::Currency::hold(&reason.into(), who, amount)
    }

    /// Gives back what is on hold; the whole amount, or an error.
    pub(crate) fn release(reason: HoldReason, who: &AccountId, amount: Balance) -> DispatchResult {
        T::Currency::release(&reason.into(), who, amount, Precision::Exact).map(drop)
    }

    /// Opens a run's pot: it needs the existential deposit to carry a hold.
    pub(crate) fn open_pot(run_id: &RunId, owner: &AccountId) -> DispatchResult {
        let existential_deposit = T::Currency::minimum_balance();
        let pot = Self::pot_account(run_id);
        T::Currency::transfer(owner, &pot, existential_deposit, Preservation::Preserve).map(drop)
    }

    /// Sends what is free in an emptied pot to the owner and removes the account.
    pub(crate) fn close_pot(run_id: &RunId, owner: &AccountId) -> DispatchResult {
        let pot = Self::pot_account(run_id);
        let free =
            T::Currency::reducible_balance(&pot, Preservation::Expendable, Fortitude::Polite);
        if free == 0 {
            return Ok(());
        }
        T::Currency::transfer(&pot, owner, free, Preservation::Expendable).map(drop)
    }

    /// Moves free money of `funder` into the escrow.
    pub(crate) fn fund_escrow(
        run_id: &RunId,
        run: &mut Run,
        funder: &AccountId,
        amount: Balance,
    ) -> DispatchResult {
        T::Currency::transfer_and_hold(
            &HoldReason::RunEscrow.into(),
            funder,
            &Self::pot_account(run_id),
            amount,
            Precision::Exact,
            Preservation::Preserve,
            Fortitude::Polite,
        )?;
        run.escrow = add(run.escrow, amount)?;
        run.funded = add(run.funded, amount)?;
        run.funded_outstanding = add(run.funded_outstanding, amount)?;
        Ok(())
    }

    /// Moves up to `amount` of a lost stake or bond into the escrow; returns what was moved.
    pub(crate) fn recover_into_escrow(
        run_id: &RunId,
        run: &mut Run,
        from: (HoldReason, &AccountId),
        amount: Balance,
        reason: RecoveryReason,
    ) -> Result<Balance, DispatchError> {
        if amount == 0 {
            return Ok(0);
        }
        let pot = Self::pot_account(run_id);
        let (hold_reason, loser) = from;
        let moved = T::Currency::transfer_on_hold(
            &hold_reason.into(),
            loser,
            &pot,
            amount,
            Precision::BestEffort,
            Restriction::Free,
            Fortitude::Force,
        )?;
        Self::hold(HoldReason::RunEscrow, &pot, moved)?;
        run.escrow = add(run.escrow, moved)?;
        run.recovered = add(run.recovered, moved)?;
        Self::deposit_event(Event::EscrowRecovered {
            run: *run_id,
            from: loser.clone(),
            amount: moved,
            reason,
        });
        Ok(moved)
    }

    /// Pays `amount` that is on hold on `from` to `to`, or nothing if `to` cannot receive it: an
    /// account that does not exist must not block a slash. Returns what was paid.
    pub(crate) fn pay_from_hold(
        reason: HoldReason,
        from: &AccountId,
        to: &AccountId,
        amount: Balance,
    ) -> Result<Balance, DispatchError> {
        let receivable =
            T::Currency::can_deposit(to, amount, Provenance::Extant) == DepositConsequence::Success;
        if amount == 0 || !receivable {
            return Ok(0);
        }
        T::Currency::transfer_on_hold(
            &reason.into(),
            from,
            to,
            amount,
            Precision::BestEffort,
            Restriction::Free,
            Fortitude::Force,
        )
    }

    /// Pays out of the escrow: the whole amount, or an error.
    pub(crate) fn pay_from_escrow(
        run_id: &RunId,
        run: &mut Run,
        to: &AccountId,
        amount: Balance,
    ) -> DispatchResult {
        if amount == 0 {
            return Ok(());
        }
        T::Currency::transfer_on_hold(
            &HoldReason::RunEscrow.into(),
            &Self::pot_account(run_id),
            to,
            amount,
            Precision::Exact,
            Restriction::Free,
            Fortitude::Force,
        )?;
        run.escrow = subtract(run.escrow, amount)?;
        Ok(())
    }

    #[cfg(any(feature = "try-runtime", test))]
    pub(crate) fn held(reason: HoldReason, who: &AccountId) -> Balance {
        use frame_support::traits::fungible::InspectHold;
        T::Currency::balance_on_hold(&reason.into(), who)
    }

    /// Takes the deposit of one more record from the run's owner.
    pub(crate) fn charge_record(run: &mut Run) -> DispatchResult {
        let deposit = T::RecordDeposit::get();
        Self::hold(HoldReason::StorageDeposit, &run.owner, deposit)?;
        run.deposit = add(run.deposit, deposit)?;
        Ok(())
    }
}

pub(crate) fn add(left: Balance, right: Balance) -> Result<Balance, ArithmeticError> {
    left.checked_add(right).ok_or(ArithmeticError::Overflow)
}

pub(crate) fn subtract(left: Balance, right: Balance) -> Result<Balance, ArithmeticError> {
    left.checked_sub(right).ok_or(ArithmeticError::Underflow)
}
